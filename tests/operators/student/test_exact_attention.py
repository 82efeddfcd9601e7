"""Students without torch's scaled dot product attention are examined, scored and trained like others."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf

from operators.student.doctor import StudentNeeds, examine_student
from operators.student.encode import IGNORED, Encoded
from operators.student.exact_attention import exact_attention
from operators.student.nll import load_causal_lm, sum_nll
from operators.student.packed_documents import Pack
from operators.student.packed_loss import load_trainable, summed_loss
from operators.student.pool import StudentPoolConfig

IDS = {"vocab_size": 49_152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
WITHOUT_SDPA = {
    "gpt_neo": tf.GPTNeoConfig(
        **IDS,
        hidden_size=32,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        num_heads=2,
        max_position_embeddings=256,
        window_size=16,
    ),
    "bloom": tf.BloomConfig(**IDS, hidden_size=32, n_layer=2, n_head=2),
    "mamba": tf.MambaConfig(**IDS, hidden_size=32, num_hidden_layers=2),
}


@pytest.fixture(scope="module", params=WITHOUT_SDPA)
def student(request, tmp_path_factory, demo_model):
    """A folder with a random model of the family and the demo model's tokenizer; tokens influence each other."""
    folder = tmp_path_factory.mktemp("students") / request.param
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(WITHOUT_SDPA[request.param])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(demo_model) / name, folder / name)
    return str(folder)


def test_the_implementation_that_the_architecture_has(student, tiny_model):
    assert exact_attention(student) == "eager"
    assert exact_attention(tiny_model) == "sdpa"


def test_the_doctor_asks_for_unpacked_training_where_documents_leak(student):
    found = examine_student(student, StudentNeeds(max_tokens=256))
    # transformers masks GPT-Neo's documents by their positions; ALiBi and states know no documents.
    assert [finding.key for finding in found] == ([] if student.endswith("gpt_neo") else ["pack.packed"])
    assert examine_student(student, StudentNeeds(max_tokens=256, packed=False)) == []


def test_hyper_attention_is_refused(student):
    found = examine_student(student, StudentNeeds(max_tokens=256, packed=False, hyper_attention_layers="all"))
    assert [finding.key for finding in found if finding.fatal] == ["train.hyper_attention_layers"]


def test_padding_changes_no_score(student):
    model = load_causal_lm(student, StudentPoolConfig())
    tokens = torch.randint(10, 49_000, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [Encoded(tokens[:length], [IGNORED] * 3 + tokens[3:length]) for length in (90, 17)]
    together = sum_nll(model, examples, batch_tokens=256)
    alone = [sum_nll(model, [one], batch_tokens=256)[0] for one in examples]
    assert together == pytest.approx(alone, rel=1e-5)


def test_the_loss_of_training_is_that_of_scoring(student):
    tokens = torch.randint(10, 49_000, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    labels = [IGNORED] * 20 + tokens[20:]
    scored = sum_nll(load_causal_lm(student, StudentPoolConfig()), [Encoded(tokens, labels)], 256)[0]
    model = load_trainable(student, torch.float32).eval()
    loss = summed_loss(model, Pack(tokens, labels, [60], [0]))
    assert loss.item() == pytest.approx(scored, rel=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_another_kind_of_model_is_refused(tmp_path):
    tf.T5Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a causal language model"):
        exact_attention(str(tmp_path))
