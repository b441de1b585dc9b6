"""How the arms of a comparison are written in params: `kdrl 0.3 from weak by terse`.

That is the method, the teacher's weight, the student and the teacher. All but the method may be left out: the weight
where it is chosen or there is none, the models where they are called student and teacher.
"""

import re
from typing import NamedTuple

from limbeck.training import objectives

START, TEACHER = "start", "teacher"  # methods that are not trained
_WRITTEN = re.compile(r"(?P<method>\w+)( (?P<kd_coef>[\d.e-]+))?( from (?P<student>\w+))?( by (?P<teacher>\w+))?")


class WrittenArm(NamedTuple):
    """One arm of a comparison; a weight of None is chosen, or there is none."""

    student: str
    teacher: str
    method: str
    kd_coef: float | None

    @property
    def mixed(self) -> bool:
        """Whether it weighs the teacher against the reward at a constant or annealed weight."""
        if self.method in (START, TEACHER):
            return False
        arm = objectives.arm(self.method)
        return arm.reward and arm.asks_teacher and arm.schedule != "switch"

    @property
    def pair(self) -> dict[str, str]:
        """The coordinates of its models."""
        return {"student": self.student, "teacher": self.teacher}


def read(written: str) -> WrittenArm:
    """One arm. Raises ValueError for one that is not written so, an unknown method, or a weight where none counts."""
    found = _WRITTEN.fullmatch(written)
    if found is None:
        raise ValueError(f"received arm {written!r}, expected `method`, `method 0.3`, `... from student by teacher`")
    if found["method"] not in (START, TEACHER):
        objectives.arm(found["method"])
    models = found["student"] or "student", found["teacher"] or "teacher"
    line = WrittenArm(*models, found["method"], None if found["kd_coef"] is None else float(found["kd_coef"]))
    if line.kd_coef is not None and not line.mixed:
        raise ValueError(f"received arm {written!r}, expected no weight: nothing is weighed in it")
    return line
