"""What a test can see of a picture: its texts, and whether they cover each other."""

import contextlib
import itertools
from unittest.mock import patch

from matplotlib.figure import Figure
from matplotlib.text import Text


@contextlib.contextmanager
def drawn_figures():
    """The figures that are saved within, in a list that grows."""
    figures, honest = [], Figure.savefig

    def keep(self, *words, **options):
        figures.append(self)
        honest(self, *words, **options)

    with patch.object(Figure, "savefig", keep):
        yield figures


def texts_of(figure):
    """(text, box in pixels) of everything that is written in a figure."""
    figure.canvas.draw()
    unseen = {label for axes in _axes_of(figure) for label in _unseen_labels(axes)}
    found = [text for text in figure.findobj(Text) if text not in unseen]
    shown = [one for one in found if one.get_text().strip() and one.get_visible()]
    boxes = [(one.get_text(), one.get_window_extent()) for one in shown]
    return [(text, box) for text, box in boxes if box.width > 0]


def _axes_of(figure):
    return [*figure.axes, *(child for axes in figure.axes for child in axes.child_axes)]


def _unseen_labels(axes):
    """Labels of ticks beyond the ends of an axis, which are made and never drawn."""
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        room = 1e-9 * (high - low)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low - room <= tick.get_loc() <= high + room:
                yield from (tick.label1, tick.label2)


def tick_labels_of(figure):
    """The numbers along the axes of a figure."""
    figure.canvas.draw()
    for axes in _axes_of(figure):
        unseen = set(_unseen_labels(axes))
        for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            if label not in unseen and label.get_text():
                yield label.get_text()


def require_readable(figure):
    """Fail where a text covers another one, or leaves the picture."""
    texts = texts_of(figure)
    for (text, box), (other, other_box) in itertools.combinations(texts, 2):
        assert not box.overlaps(other_box), f"'{text}' and '{other}' cover each other"
    for text, box in texts:
        inside = box.x0 >= 0 and box.y0 >= 0
        inside &= box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
        assert inside, f"'{text}' leaves the picture"
