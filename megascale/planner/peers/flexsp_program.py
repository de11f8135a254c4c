"""The mixed-integer program of FlexSP: how the ranks of one micro-batch form groups.

Source: FlexSP (arXiv 2412.01523), the section on the formulation. HiGHS solves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megascale.planner.linear_program import Rows, linear_program, quiet_solver
from megascale.planner.problem import Problem

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

MOST_STUDIED = 8000
"""Variables up to which HiGHS may presolve a program and look for symmetry: these forget the time
limit (of 2 s, presolve took 29 s for 10,000; of 6 s, symmetry took 169 s for 190,000)."""


class Group(NamedTuple):
    """Ranks that share sequences, before it is known which ranks."""

    degree: int
    """Number of ranks, a power of two."""
    sequences: list[int]
    """Indices into the lengths of the micro-batch; of the step in a finished plan."""


@dataclass(frozen=True)
class Program:
    """The mixed-integer program of one micro-batch.

    Slots p of degree d_p stand for groups that may be used. Minimise the time C over the binary
    m_p (slot p is used) and the integer A_qp (sequences of bucket q in slot p), where
    time of slot p <= C, its tokens <= d_p * capacity * m_p, sum d_p m_p <= ranks, and
    sum over p of A_qp = sequences of bucket q.

    The bound on tokens stands for two rows of the paper, memory and "no sequences in an unused
    slot". Slots of a degree are used in order (m_p >= m_p+1), since they are alike. No more slots
    of a degree are offered than there are sequences. Degrees that do not divide a node count as
    across nodes unless there is only one.
    """

    lengths: Integers
    """Upper length of each bucket, ascending, [buckets]."""
    counts: Integers
    """Sequences of each bucket, [buckets]."""
    degrees: Integers
    """Ranks of each slot, descending, [slots]."""
    capacity: int
    """Most tokens per rank."""
    num_ranks: int
    """Most ranks of all slots in use."""
    overhead_s: Floats
    """Seconds of a slot in use, before any work, [slots]."""
    work_s: tuple[Floats, ...]
    """Seconds that one sequence of a bucket adds to a slot, [slots, buckets]; the slowest sum of
    them counts: compute and transfer, and if keys are passed on slower than attention computes,
    the passing in place of attention."""

    @staticmethod
    def of(problem: Problem, lengths: Integers, counts: Integers) -> Program:
        """The program for buckets of `counts` sequences taken as `lengths` tokens each."""
        cost, most = problem.cost, int(counts.sum())
        powers = [1 << power for power in range(problem.num_ranks.bit_length())]
        degrees = np.repeat(powers[::-1], [min(problem.num_ranks // d, most) for d in powers[::-1]])
        is_within = (cost.node_size % degrees == 0) | (problem.num_ranks <= cost.node_size)
        overhead_s = cost.seconds(0.0, 0.0, degrees, is_within)
        tokens = lengths.astype(np.float64)
        transfer = np.where(is_within, cost.transfer_intra, cost.transfer_inter) * (degrees > 1)
        passing = np.where(is_within, cost.pass_intra, cost.pass_inter) * (degrees - 1)
        shared = tokens * (cost.b + transfer[:, None])
        works = [(shared + cost.a * tokens * tokens) / degrees[:, None]]
        if passing.any():
            works.append((shared + passing[:, None] * tokens) / degrees[:, None])
        return Program(
            lengths,
            counts,
            degrees,
            problem.capacity,
            problem.num_ranks,
            overhead_s,
            tuple(works),
        )

    def solve(self, start: Sequence[Group] | None, limit_s: float) -> list[Group] | None:
        """The best groups found from `start` on within `limit_s` seconds, by HiGHS.

        Groups hold positions in the list of all sequences, ascending, and `start` does so too.
        None where nothing was found.
        """
        import highspy

        slot, bucket = np.nonzero(self.lengths <= self.capacity * self.degrees[:, None])
        library: Any = highspy  # partly without types
        solver = quiet_solver()
        solver.setOptionValue("time_limit", limit_s)
        if len(slot) > MOST_STUDIED:
            solver.setOptionValue("presolve", "off")
            solver.setOptionValue("mip_detect_symmetry", False)
        solver.passModel(self._model(slot, bucket))
        if start is not None:
            solution = library.HighsSolution()
            solution.col_value = self._columns(self._taken(start), slot, bucket)
            solver.setSolution(solution)
        solver.run()
        status = solver.getInfo().primal_solution_status
        if status != library.SolutionStatus.kSolutionStatusFeasible:
            return None
        values = np.array(solver.getSolution().col_value)[1 + len(self.degrees) :]
        held = np.zeros((len(self.degrees), len(self.lengths)), dtype=np.int64)
        held[slot, bucket] = np.rint(values)
        return self._groups(held)

    def _model(self, slot: Integers, bucket: Integers) -> Any:
        """The program for HiGHS: columns are C, m_p, and A_qp for the given pairs of p and q."""
        import highspy

        num_integers = len(self.degrees) + len(slot)
        most = np.concatenate([[np.inf], self.degrees > 0, self.counts[bucket]])
        model = linear_program(self._rows(slot, bucket), np.zeros(len(most)), most)
        kinds: Any = highspy.HighsVarType
        model.integrality_ = [kinds.kContinuous] + [kinds.kInteger] * num_integers
        return model

    def _rows(self, slot: Integers, bucket: Integers) -> Rows:
        """The constraints."""
        slots = np.arange(len(self.degrees))
        used, held = 1 + slots, 1 + len(slots) + np.arange(len(slot))
        rows = Rows()
        for work_s in self.work_s:
            time_is = (slots, 0 * slots, np.ones(len(slots)))
            overhead = (slots, used, -self.overhead_s / self._unit_s)
            work = (slot, held, -work_s[slot, bucket] / self._unit_s)
            rows.add(len(slots), 0.0, np.inf, time_is, overhead, work)
        room = (slots, used, self.degrees * float(self.capacity))
        rows.add(len(slots), 0.0, np.inf, room, (slot, held, -1.0 * self.lengths[bucket]))
        alike = np.flatnonzero(np.diff(self.degrees) == 0)
        row = np.arange(len(alike))
        one = np.ones(len(alike))
        rows.add(len(alike), 0.0, np.inf, (row, used[alike], one), (row, used[alike] + 1, -one))
        rows.add(1, 0.0, float(self.num_ranks), (0 * slots, used, 1.0 * self.degrees))
        for number, count in enumerate(self.counts.tolist()):
            members = held[bucket == number]
            rows.add(1, count, count, (0 * members, members, np.ones(len(members))))
        return rows

    @property
    def _unit_s(self) -> float:
        """Seconds of a unit of C: about the best time there can be, for the solver's tolerances."""
        return float(self.overhead_s[0] + self.counts @ self.work_s[0][0]) or 1.0

    def _columns(self, taken: Integers, slot: Integers, bucket: Integers) -> list[float]:
        """The solution for HiGHS with `taken` sequences of each bucket in each slot."""
        used: NDArray[np.bool_] = taken.sum(axis=1) > 0
        slowest_s = max(
            float(((taken * work_s).sum(axis=1) + self.overhead_s * used).max())
            for work_s in self.work_s
        )
        return [slowest_s / self._unit_s, *map(float, used), *map(float, taken[slot, bucket])]

    def _taken(self, groups: Sequence[Group]) -> Integers:
        """Sequences of each bucket in each slot, [slots, buckets]; the inverse of `_groups`."""
        of_sequence = np.repeat(np.arange(len(self.counts)), self.counts)
        taken = np.zeros((len(self.degrees), len(self.counts)), dtype=np.int64)
        used = np.zeros(len(self.degrees), dtype=np.int64)
        for group in groups:
            first = int(np.searchsorted(-self.degrees, -group.degree))
            np.add.at(taken[first + used[first]], of_sequence[group.sequences], 1)
            used[first] += 1
        return taken

    def _groups(self, taken: Integers) -> list[Group]:
        """Slots in use, with sequences of each bucket dealt in order: to the program all alike."""
        groups: list[list[int]] = [[] for _ in self.degrees]
        sequence = 0
        for slot, bucket in zip(*np.nonzero(taken.T)[::-1], strict=True):
            count = int(taken[slot, bucket])
            groups[slot] += range(sequence, sequence + count)
            sequence += count
        degrees = self.degrees.tolist()
        return [Group(d, held) for d, held in zip(degrees, groups, strict=True) if held]
