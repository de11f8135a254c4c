"""Who waits in a collective, and who has not come to it, is seen from outside."""

import threading
import time

import pytest

from megascale.runtime.pulse import CALLS, LAST, NAMES, WAITED, WAITS, open_page, pulse


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
    """Rank 1 comes late; what a driver would see of this rank meanwhile, and afterwards."""
    import torch.distributed as dist

    from megascale.runtime.pulse import watch_collectives

    watch_collectives()
    dist.init_process_group("gloo")
    dist.barrier()
    page = path / f"{dist.get_rank()}"
    page.write_bytes(bytes(4096))
    pulse.open(page, dist.get_rank())
    seen = []

    def look():
        time.sleep(0.3)
        its = open_page(page)
        seen.append((its[WAITS], its[CALLS], NAMES[its[LAST]]))

    watcher = threading.Thread(target=look)
    watcher.start()
    if dist.get_rank() == 1:
        time.sleep(0.7)
    operation(name)
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
    assert waiting[1] == late[1] == 0 and waiting[2] > 0.2 > late[2]
