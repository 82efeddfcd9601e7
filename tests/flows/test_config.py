"""A mistake in the configuration gives one line with file, key, value and the allowed values."""

from pathlib import Path

import pytest

from flows.config import ConfigError, evaluate_config, load_config

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
SMOKE = REPOSITORY / "configs" / "smoke.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path: Path) -> None:
    assert load_config(path, []).name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_text_that_is_trained_on_can_be_scored_and_evaluated(path: Path) -> None:
    config = load_config(path, [])
    assert config.score.max_tokens >= config.pack.max_tokens
    assert evaluate_config(config).max_tokens >= config.pack.max_tokens


def test_a_checkpoint_to_begin_with_is_named_from_here_not_from_a_worker() -> None:
    assert load_config(SMOKE, ["train.resume_from=a/step-1"]).train.resume_from == str(Path("a/step-1").absolute())
    assert load_config(SMOKE, []).train.resume_from == ""


def test_overrides_are_applied_and_typed() -> None:
    config = load_config(SMOKE, ["train.max_steps=7", "select.policy=none", "teacher.replicas=[1, 4]", "source.limit="])
    assert config.train.max_steps == 7
    assert config.select.policy == "none"
    assert config.teacher.replicas == (1, 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.zero_stage=4", r"smoke.yaml: train.zero_stage: 4 is not one of 0, 1, 2, 3"),
        ("train.neftune_alfa=5", r"smoke.yaml: train.neftune_alfa: no such key; there are .*neftune_alpha"),
        ("trian.max_steps=5", r"smoke.yaml: trian: no such key; there are .*train"),
        ("train.num_workers=0", r"smoke.yaml: train.num_workers: 0: input should be greater than or equal to 1"),
        ("teacher.backend=gpt", r"smoke.yaml: teacher.backend: 'gpt' is not one of vllm, openai, scripted"),
        ("select.policy=best", r"smoke.yaml: select.policy: 'best' is not one of .*ifd_rifd"),
        ("train.max_steps=[1", r"'train.max_steps=\[1': the value is not YAML: "),
        ("train", r"'train': an override has the form dotted.key=value"),
        ("name.first=x", r"'name.first=x': name is a value, not a section"),
    ],
)
def test_mistakes_are_explained(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config(SMOKE, [override])
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "refused_for"),
    [
        (["teacher.backend=vllm", "teacher.max_model_len=1000"], "reflect_instructions"),
        (["teacher.backend=vllm", "teacher.max_model_len=1000", "teacher.max_tokens=512"], ""),
        (["teacher.backend=vllm", "teacher.max_model_len=1000", "teacher.mix=[{backend: openai}]"], ""),
        (["teacher.backend=openai", "reflect.max_tokens=4096"], ""),
        (["teacher.stages={reflect_responses: {backend: vllm, max_model_len: 1000}}"], "reflect_responses"),
        (["teacher.stages={judge: {backend: vllm, max_model_len: 1000}}"], ""),
    ],
)
def test_a_reply_has_to_leave_room_for_a_prompt_where_vllm_makes_it(overrides: list[str], refused_for: str) -> None:
    if not refused_for:
        load_config(SMOKE, overrides)
        return
    message = rf"reflect.max_tokens: 1024 leaves no room for a prompt in teacher.max_model_len: 1000 of {refused_for};"
    with pytest.raises(ConfigError, match=message):
        load_config(SMOKE, overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "not a YAML file"), ("- 1", "holds list, keys and values are needed"), ("", "holds NoneType")],
)
def test_a_file_that_is_not_a_configuration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "x.yaml", [])


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}: cannot be read: Is a directory"):
        load_config(tmp_path, [])


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file"):
        load_config(Path("nowhere.yaml"), [])


def test_identity_leaves_out_resources_and_batch_sizes() -> None:
    plain, scaled = (load_config(SMOKE, over) for over in ([], ["teacher.replicas=8", "teacher.batch_rows=7"]))
    assert plain.teacher.identity() == scaled.teacher.identity()
    assert plain.teacher.identity() != load_config(SMOKE, ["teacher.temperature=0.5"]).teacher.identity()


def test_shipped_configurations_are_found_from_any_folder_but_local_ones_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load_config(Path("configs/smoke.yaml"), [])
    assert shipped.source.path == str(REPOSITORY / "configs" / "demo_instructions.jsonl")
    (tmp_path / "configs").mkdir()
    own = tmp_path / "configs" / "smoke.yaml"
    own.write_text(SMOKE.read_text().replace("name: smoke", "name: mine"))
    assert load_config(Path("configs/smoke.yaml"), []).name == "mine"
    with pytest.raises(ConfigError, match=r"configs/other.yaml: no such file"):
        load_config(Path("configs/other.yaml"), [])


def test_models_of_every_part_of_a_teacher_are_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "big").mkdir()
    overrides = [
        "teacher.backend=vllm",
        "teacher.model=big",
        "teacher.tokenizer=./big",
        "teacher.stages={judge: {model: big}, repair: {mix: [{model: big}, {backend: openai, model: big}]}}",
        "teacher.mix=[{model: big, weight: 2}, {model: org/hub}, {backend: openai, model: big, tokenizer: big}]",
        "student.model=big",
    ]
    config, there = load_config(SMOKE, overrides), str(tmp_path / "big")
    teacher = config.teacher
    assert (teacher.model, teacher.tokenizer, config.student.model) == (there, there, there)
    mixed = ({"model": there}, {"backend": "openai", "model": "big"})  # an endpoint knows its model by name
    assert teacher.stages == {"judge": {"model": there}, "repair": {"mix": mixed}}
    assert [part["model"] for part in teacher.mix] == [there, "org/hub", "big"]
    assert teacher.mix[2]["tokenizer"] == there
    assert load_config(SMOKE, ["teacher.backend=openai", "teacher.model=big"]).teacher.model == "big"


def test_a_tokenizer_that_is_not_named_is_not_the_working_directory() -> None:
    """Earlier, every endpoint was refused with `folder ... has no config.json`."""
    endpoint = ["teacher.backend=openai", "teacher.model=m", "teacher.base_url=http://127.0.0.1:1/v1"]
    assert load_config(REPOSITORY / "configs/smoke.yaml", endpoint).teacher.tokenizer == ""
