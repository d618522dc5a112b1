"""The instruction a query carries in each task: those of E5-mistral (Wang et al. 2024, arXiv 2401.00368, appendix).

mteb ships those of 54 of the paper's 56 tasks word for word; the two below differ there or are absent. A passage
carries no instruction. A task that mteb does not know has none here: the model's own template then decides.
"""

from __future__ import annotations

_CQADUPSTACK = (
    "Given a question, retrieve detailed question descriptions from Stackexchange that are duplicates to the given "
    "question"
)
_SUMMEVAL = "Given a news summary, retrieve other semantically similar summaries"


def instruction_for(task_name: str, prompt_type: str | None = None) -> str | None:
    """The instruction of one side of a task.

    prompt_type: "query" or "document"; None where a task compares texts of one kind (STS, clustering, ...).
    Returns "" for documents, None where mteb does not know the task and the template's default applies.
    """
    if prompt_type == "document":
        return ""
    if task_name.startswith("CQADupstack"):  # the task and its twelve forums
        return _CQADUPSTACK
    if task_name == "SummEval":
        return _SUMMEVAL
    import mteb
    from mteb.abstasks.abstask import get_abstask_prompt

    try:
        prompt = mteb.get_task(task_name).metadata.prompt
    except KeyError:
        return None
    if isinstance(prompt, dict):
        prompt = prompt.get("query")
    return prompt or get_abstask_prompt(task_name)
