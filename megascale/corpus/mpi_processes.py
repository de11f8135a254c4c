"""The processes that `mpiexec` started, or this one alone."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from megascale.errors import UserError
from megascale.installation import install_command, is_installed

T = TypeVar("T")
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")


def started_by_mpi() -> bool:
    """Whether MPI or srun started this process, as one of several or of unknown many."""
    sizes = [os.environ[name] for name in _SIZES if name in os.environ]
    return sizes[0] != "1" if sizes else "PMIX_RANK" in os.environ or _tasks_of_srun() > 1


def _tasks_of_srun() -> int:
    """Without an MPI kind, srun starts tasks that know nothing of each other."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))


def launched_rank() -> int:
    """This process's rank by the word of its launcher, without asking MPI; 0 without one."""
    return next((int(os.environ[name]) for name in _RANKS if name in os.environ), 0)


def _world() -> Any:
    """MPI's communicator of all ranks.

    Raises UserError where no MPI library is there, or another than the launcher's: then every
    process would take itself for the only one, and all would write the same files.
    """
    if not is_installed("mpi4py"):
        raise UserError(f"started by MPI, but mpi4py is not installed; {install_command('data')}")
    try:
        with warnings.catch_warnings(action="ignore"):  # it warns of what is refused below
            from mpi4py import MPI
    except (ImportError, RuntimeError):
        raise UserError(
            "started by MPI, but mpi4py finds no MPI library; install the one that mpiexec is of, "
            "or start it without mpiexec"
        ) from None
    world = MPI.COMM_WORLD
    sizes = [int(os.environ[name]) for name in _SIZES if name in os.environ]
    expected = sizes[0] if sizes else max(launched_rank() + 1, _tasks_of_srun())
    if world.Get_size() < expected:
        library = MPI.Get_library_version().split(",")[0].split("\n")[0]
        raise UserError(
            f"{expected} ranks or more were started and MPI sees {world.Get_size()}: mpi4py's is "
            f"another one ({library}); start them with its mpiexec or an srun --mpi=KIND of it"
        )
    return world


class Team:
    """Ranks that do a job together; an error of one is raised on all, so that none waits."""

    def __init__(self) -> None:
        self._comm: Any = None
        self.rank, self.size = 0, 1
        if started_by_mpi():
            self._comm = _world()
            self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()

    def lead(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0 alone; every rank gets its result. Raises UserError everywhere."""
        result, error = self._attempt(work) if self.rank == 0 else (None, None)
        if self._comm is not None:
            result, error = self._comm.bcast((result, error), root=0)
        if error is not None:
            raise UserError(error)
        return result  # type: ignore[return-value]

    def each(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on every rank; every rank gets all results, in rank order.

        Raises the UserError of the lowest rank that met one, everywhere.
        """
        outcomes = [self._attempt(work)]
        if self._comm is not None:
            outcomes = self._comm.allgather(outcomes[0])
        for _, error in outcomes:
            if error is not None:
                raise UserError(error)
        return [result for result, _ in outcomes]  # type: ignore[misc]

    def share_of(self, count: int) -> range:
        """This rank's contiguous part of `count` things."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def _attempt(self, work: Callable[[], T]) -> tuple[T | None, str | None]:
        """The result or the user's error; any other ends all ranks, which would wait for ever."""
        try:
            return _result_or_error(work)
        except BaseException:
            if self._comm is None:
                raise
            traceback.print_exc()
            self._comm.Abort(1)
            raise


def _result_or_error(work: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return work(), None
    except UserError as error:
        return None, str(error)
    except OSError as error:
        if error.errno is None:
            raise
        return None, f"{error.filename or 'disk'}: {error.strerror}; mend it and prepare again"
