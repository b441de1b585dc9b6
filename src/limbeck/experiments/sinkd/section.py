"""What every SinKD experiment that trains has in params/sinkd.yaml; sources stand there."""

from dataclasses import asdict, dataclass

from limbeck.params import positive

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Section:
    """Texts, the teacher's training and the student's, and what the losses of every architecture need."""

    longest: int
    split_sizes: tuple[int, ...]
    split_seed: int
    teacher_seed: int
    teacher_epochs: int
    teacher_learning_rate: float
    epochs: int
    learning_rate: float
    batch_size: int
    clip_norm: float
    save_every: int
    matching_batches: int
    kl_temperature: float
    epsilon: float
    iterations: int

    def __post_init__(self) -> None:
        """Check what no type can."""
        if len(self.split_sizes) != len(SPLITS):
            raise ValueError(f"split_sizes must hold one number each for {', '.join(SPLITS)}, got {self.split_sizes}")
        positive(**{name: value for name, value in asdict(self).items() if type(value) is float})
        positive(batch_size=self.batch_size, epochs=self.epochs, iterations=self.iterations)
        positive(save_every=self.save_every, longest=self.longest)
