"""The plan's calls are those that are then made, stage by stage: reflections, repairs, pairs and answers judged."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.config import load_config
from flows.graph import (
    EVALUATION,
    INSTRUCTION_REFLECTIONS,
    RAW_INSTRUCTIONS,
    RECYCLED_INSTRUCTIONS,
    RESPONSE_REFLECTIONS,
    SELECTED_INSTRUCTIONS,
)
from flows.recycle_and_train import GRAPH
from flows.run import open_run
from flows.teacher_work import ABOUT, AT_MOST, JUDGE_EVALUATES, JUDGE_SELECTS, Work, teacher_work
from tests.flows.flow_runs import SMOKE, Flow, manifest, write_source

FIRST, FIRST_REPAIR = "reflect_instructions", "reflect_instructions_repair"
SECOND, SECOND_REPAIR = "reflect_responses", "reflect_responses_repair"
SETTINGS = (
    "source.held_out_fraction=0.2",
    "teacher.model=careless",
    "teacher.max_attempts=1",
    "select.policy=judge",
    "select.judge_prompt.system=You are strict.",
    "evaluate.judge_prompt.criteria.tone=Is it kind?",
    "train.max_steps=1",
    "evaluate.judge=true",
    "evaluate.num_samples=4",
)


@dataclass
class Project:
    """A source and a storage of one's own."""

    folder: Path
    flow: Flow
    model: str

    @property
    def settings(self) -> list[str]:
        return [f"source.path={self.folder / 'source.jsonl'}", *SETTINGS]

    def plan(self) -> dict[str, Work]:
        own = [f"storage={self.folder}/storage", f"student.model={self.model}", "train.num_workers=1"]
        run = open_run(load_config(Path(SMOKE), [*own, *self.settings]), GRAPH.specs)
        with run.store.looking():
            return {work.name: work for work in teacher_work(run, "base")}

    def make(self, *arguments: str) -> None:
        code, printed = self.flow(*self.settings, *arguments)
        assert code == 0, printed

    def made(self, asset: str, name: str = "calls") -> int:
        return int(manifest(self.folder, asset)["metrics"].get(name, 0))


@pytest.fixture
def project(flow: Flow, tmp_path: Path, tiny_model: str) -> Project:
    write_source(tmp_path / "source.jsonl", 24)
    return Project(tmp_path, flow, tiny_model)


@pytest.mark.slow
def test_what_is_planned_is_what_is_made(project: Project) -> None:
    plan = project.plan()
    rows = plan[FIRST].new
    pairs = {JUDGE_SELECTS: 3 * rows, JUDGE_EVALUATES: 2 * 4}
    assert {name: (work.new, work.reach) for name, work in plan.items()} == {
        **dict.fromkeys([FIRST, FIRST_REPAIR, SECOND, SECOND_REPAIR, *pairs], (rows, AT_MOST)),
        **{name: (calls, AT_MOST) for name, calls in pairs.items()},
        FIRST: (rows, ""),
    }
    project.make("reflect.repair=false", "--select", f"{RAW_INSTRUCTIONS},{INSTRUCTION_REFLECTIONS}")
    assert project.made(INSTRUCTION_REFLECTIONS) == rows
    assert 0 < project.made(INSTRUCTION_REFLECTIONS, "prompt_tokens") <= plan[FIRST].tokens.prompt

    plan = project.plan()  # the replies are there, so that those to repair are known
    assert (plan[FIRST].new, plan[FIRST].known, plan[FIRST_REPAIR].reach) == (0, rows, "")
    project.make("--select", INSTRUCTION_REFLECTIONS)
    assert project.made(INSTRUCTION_REFLECTIONS) == plan[FIRST_REPAIR].new > 0

    plan = project.plan()
    project.make("--select", f"{SELECTED_INSTRUCTIONS},{RESPONSE_REFLECTIONS}")
    judged = project.made(SELECTED_INSTRUCTIONS)
    assert project.made(RESPONSE_REFLECTIONS) <= plan[SECOND].new + plan[SECOND_REPAIR].new

    later = project.plan()[JUDGE_SELECTS]
    assert later.reach == ""
    project.make()
    assert project.made(RECYCLED_INSTRUCTIONS) == later.new > 0
    assert judged < judged + later.new <= plan[JUDGE_SELECTS].new
    assert project.made(EVALUATION) <= plan[JUDGE_EVALUATES].new == 8  # equal answers tie without a call
    assert {name: work.new for name, work in project.plan().items()} == {FIRST: 0, SECOND: 0}


@pytest.mark.slow
def test_repairs_to_come_are_foretold_by_the_share_of_those_that_were_needed(project: Project) -> None:
    project.make("--select", f"{RAW_INSTRUCTIONS},{INSTRUCTION_REFLECTIONS}")
    write_source(project.folder / "source.jsonl", 48)
    plan = project.plan()
    assert plan[FIRST_REPAIR].reach == ABOUT
    assert 0 < plan[FIRST_REPAIR].new < plan[FIRST].new


@pytest.mark.slow
def test_a_step_that_raises_refuses_the_plan_in_one_line(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    step = [
        "from ray.data import Dataset",
        "def broken(rows: Dataset) -> Dataset:",
        "    raise RuntimeError('no such river')",
    ]
    (project.folder / "raising_step.py").write_text("\n".join(step))
    monkeypatch.syspath_prepend(project.folder)
    code, printed = project.flow(*project.settings, "steps=[raising_step:broken]", "--plan")
    assert code == 2
    assert "refused: raw_instructions: no such river" in printed
