"""Who waits in a collective, and who has not come to it, is seen from outside."""

import threading
import time

import pytest

from megascale.runtime.heartbeat import CALLS, LAST, NAMES, WAITED, WAITS, open_page, pulse


def operation(name):
    """One operation over two ranks, in torch's own ways to begin and to wait."""
    import torch
    import torch.distributed as dist

    ones, other = torch.ones(4), 1 - dist.get_rank()
    if name == "all-reduce":
        dist.all_reduce(ones)
    elif name == "all-gather":
        dist.all_gather_into_tensor(torch.empty(8), ones)
    elif name == "barrier":
        dist.barrier()
    elif name == "receive":
        pairs = [(dist.isend, ones), (dist.irecv, torch.empty(4))]
        for work in dist.batch_isend_irecv([dist.P2POp(op, t, other) for op, t in pairs]):
            work.wait()
    elif name == "coalesced":
        with dist._coalescing_manager(async_ops=True) as works:
            dist.all_reduce(ones)
        works.wait()


def keep_the_other_waiting(name, path):
    """Rank 1 comes when rank 0 was seen to wait; what a driver sees of this rank then and later."""
    import torch.distributed as dist

    from megascale.runtime.heartbeat import watch_collectives

    watch_collectives()
    dist.init_process_group("gloo")
    dist.barrier()
    page = path / f"{dist.get_rank()}"
    page.write_bytes(bytes(4096))
    pulse.open(page, dist.get_rank())
    seen, is_first = [], dist.get_rank() == 0

    def look():
        its = open_page(page)
        while is_first and not its[WAITS]:
            time.sleep(0.01)
        seen.append((its[WAITS], its[CALLS], NAMES[its[LAST]]))
        (path / "seen").touch()

    watcher = threading.Thread(target=look) if is_first else None
    if watcher is not None:
        watcher.start()
    else:
        while not (path / "seen").exists():
            time.sleep(0.01)
        look()
        time.sleep(2)
    operation(name)
    if watcher is not None:
        watcher.join()
    dist.destroy_process_group()
    return seen[0], pulse._page[WAITS], pulse._page[WAITED] / 1e9


@pytest.mark.parametrize(
    ("name", "calls", "last"),
    [
        ("all-reduce", 1, "all-reduce"),
        ("all-gather", 1, "all-gather"),
        ("barrier", 1, "barrier"),
        ("receive", 0, "receive"),
        ("coalesced", 1, "all-reduce"),
    ],
)
def test_who_waits_is_seen(ranks, tmp_path, name, calls, last):
    (waiting, late) = ranks(2, keep_the_other_waiting, name, tmp_path)
    assert waiting[0] == (1, calls, last) and late[0] == (0, 0, "")
    assert waiting[1] == late[1] == 0 and waiting[2] > 1.8 > late[2]
