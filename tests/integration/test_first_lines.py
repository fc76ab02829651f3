"""What a real run says at its start and its end, with nothing asked for."""

from pathlib import Path

from common.runs import Run
from common.trainers import llama, make_trainer, random_loader
from composer import Trainer

from composer_tst import TokenSuperposition


def plain_trainer(yaml: str) -> Trainer:
    algorithm = TokenSuperposition(bag_size=4, duration='0.5dur')
    trainer, _ = make_trainer(llama(), random_loader(), algorithm, '40ba')
    trainer.fit()
    return trainer


def test_a_plain_trainer_says_what_it_is_going_to_do(tmp_path: Path):
    """In a process of its own, where no test has set up a log."""
    said = Run({}, tmp_path / 'log', train=plain_trainer).wait().printed()
    # 12 loader batches of 48 tokens: 20 steps of 4 and 20 of one.
    assert 'Superposition until step 20 of 40: bags of 4 for 20 steps' in said
    assert 'It reads 2.50 times the data of a plain run of as many steps, 8.3 epochs of this loader.' in said
    assert 'the next-token loss; in published runs it jumps by 1 to 2 nats. Compare runs by their valid' in said
    assert 'The run reads its data 8.3 times' in said
    assert 'Superposition: 40 steps read ' in said
