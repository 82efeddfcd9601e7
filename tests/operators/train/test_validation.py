"""Which packs are held out, which weights are the best, and when training stops."""

from dataclasses import replace

import pytest
from pydantic import ValidationError

from operators.student.packed_documents import Pack
from operators.train.config import TrainConfig
from operators.train.pack_order import pack_order
from operators.train.validation import (
    Evaluated,
    History,
    history_of,
    shared_documents,
    validation_packs,
    without_loss,
)

CONFIG = TrainConfig(evaluate_every_steps=2, validation_share=0.2, packs_per_step=3)


def test_held_out_packs_are_never_trained_on_and_all_others_once_per_epoch():
    kept_out = validation_packs(20, CONFIG)
    order = pack_order([[7]] * 20, CONFIG)
    assert len(kept_out) == 4
    for epoch in range(2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        trained = [index for step in steps for index in order.packs_of(step)]
        assert sorted([*trained, *kept_out]) == list(range(20))
    assert validation_packs(20, CONFIG.model_copy(update={"seed": 1})) != kept_out


def test_without_evaluation_no_pack_is_kept_out():
    assert validation_packs(20, TrainConfig()) == []


def test_an_evaluation_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(ValueError, match="needs 1 of 1 packs for validation"):
        pack_order([[7]], CONFIG)
    with pytest.raises(ValidationError, match="set evaluate_every_steps"):
        TrainConfig(patience=2)


PARTS = [["a", "b"], ["a#2", "c"], ["d", "b#2"], ["e"]]


def test_a_part_of_a_row_that_is_trained_on_does_not_count_for_validation():
    assert shared_documents(PARTS, [1, 3]) == {1: [0], 3: []}
    assert shared_documents(PARTS, [0, 1, 2]) == {0: [], 1: [], 2: []}, "all parts are kept out"
    assert shared_documents(PARTS, []) == {}
    with pytest.raises(ValueError, match="each of the 1 packs for validation holds only parts of rows"):
        shared_documents([["a"], ["a#2"]], [1])


def test_its_labels_are_left_out_of_the_loss():
    pack = Pack([5, 6, 7, 8, 9], [-100, 6, -100, 8, 9], [2, 3], [1, 2])
    assert without_loss(pack, [1]) == replace(pack, labels=[-100, 6, -100, -100, -100])
    assert without_loss(pack, [0]).labels == [-100, -100, -100, 8, 9]
    assert without_loss(pack, []) == pack


def test_training_stops_after_patience_evaluations_without_a_better_loss():
    history = History(patience=2)
    assert [history.add(step, loss) for step, loss in [(2, 3.0), (4, 2.0), (6, 2.5)]] == [True, True, False]
    assert not history.is_over
    assert not history.add(8, 2.0)  # as good is not better
    assert history.is_over
    assert history.best == Evaluated(4, 2.0)
    assert not History(0, [Evaluated(step, float(step)) for step in range(9)]).is_over


def test_a_restart_remembers_the_evaluations_before_it_and_forgets_later_ones():
    losses = [None, 3.0, None, 2.0, None, 2.5]
    lines = [{"step": step, "validation_loss": loss} for step, loss in enumerate(losses)]
    assert history_of(lines, 1, start=4).best == Evaluated(4, 2.0)
    assert not history_of(lines, 1, start=4).is_over
    assert history_of(lines, 1, start=6).is_over
    assert history_of([{"step": 0}], 1, start=1).best is None
