"""Fine-tune a decoder into an embedder.

    python train.py fit --config quickstart.yaml                                     # a laptop, no hub, no GPU
    python train.py fit --config grl_llama3.yaml --data.batch_size 256 --trainer.max_steps 10
    python train.py fit --config grl_llama3.yaml --model.losses.dpo.weight 0.9 --print_config

A bare config name is looked up here, then in configs/. Every key of the config is an option of the command line.
"""

from ullme.trainer.cli import main

if __name__ == "__main__":
    main()
