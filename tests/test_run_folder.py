"""The plot of a run: what its lines join, and what stands apart."""

from matplotlib import pyplot as plt

from vlm.training.run_folder import plot_loss


def drawn(history, path, monkeypatch):
    """Label -> x, y and whether points are joined, of the held-out figures."""
    monkeypatch.setattr(plt, "close", lambda figure: None)
    plot_loss(history, path)
    axis = plt.gcf().axes[1]
    return {
        line.get_label(): (
            list(line.get_xdata()),
            list(line.get_ydata()),
            line.get_linestyle() != "None",
        )
        for line in axis.lines
    }


def evaluated(step, wrong, captions, **more):
    return {"step": step, "eval": {"wrong": wrong, "right": 1.0, "captions": captions}, **more}


def test_closing_figures_on_more_rows_stand_apart_from_the_line(tmp_path, monkeypatch):
    history = [{"step": 1, "loss": 3.0}, evaluated(50, 9.0, 100), evaluated(100, 8.0, 100)]
    history.append(evaluated(120, 8.6, 400, final=True))
    found = drawn(history, tmp_path / "loss.png", monkeypatch)
    assert found["with another image, 100 captions"] == ([50, 100], [9.0, 8.0], True)
    assert found["with another image, 400 captions"] == ([120], [8.6], False)
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_closing_figures_on_the_same_rows_end_the_line(tmp_path, monkeypatch):
    history = [{"step": 1, "loss": 3.0}, evaluated(50, 9.0, 7), evaluated(120, 8.6, 7, final=True)]
    found = drawn(history, tmp_path / "loss.png", monkeypatch)
    assert found["with another image"] == ([50, 120], [9.0, 8.6], True)
