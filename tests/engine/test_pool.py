import pytest
import torch

from repro.pool import Pool


def filled(entries=10):
    pool = Pool(entries, {"x": (2,), "t": ()})
    pool.add(x=torch.arange(2.0 * entries).reshape(entries, 2), t=torch.arange(float(entries)))
    return pool


def test_a_sample_keeps_rows_together():
    batch = filled().sample(1000, torch.Generator().manual_seed(0))
    assert torch.equal(batch["x"][:, 0], 2 * batch["t"])


def test_every_entry_is_drawn_equally_often():
    """Each of 10 entries expects 2,000 of 20,000 draws; five standard deviations of the binomial are 212."""
    counts = torch.bincount(filled().sample(20_000, torch.Generator().manual_seed(0))["t"].long(), minlength=10)
    assert (counts - 2000).abs().max() < 212


def test_the_same_generator_draws_the_same_minibatch():
    one, other = (filled().sample(5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one["x"], other["x"])


def test_rows_added_in_pieces_stand_in_order():
    pool = Pool(4, {"x": (2,), "t": ()})
    for k in range(2):
        pool.add(x=torch.full((2, 2), float(k)), t=torch.full((2,), float(k)))
    batch = pool.sample(100, torch.Generator().manual_seed(0))
    assert set(batch["t"].tolist()) == {0.0, 1.0} and torch.equal(batch["x"][:, 1], batch["t"])


def test_what_is_added_is_a_copy_without_graph():
    row = torch.ones(1, 2, requires_grad=True)
    pool = Pool(1, {"x": (2,), "t": ()})
    pool.add(x=row * 2, t=torch.zeros(1))
    with torch.no_grad():
        row.zero_()
    drawn = pool.sample(1, torch.Generator())["x"]
    assert drawn.tolist() == [[2.0, 2.0]] and not drawn.requires_grad


def test_a_row_keeps_the_shape_of_its_column():
    pool = Pool(6, {"x": (3, 2, 2), "label": (), "v": (5,)})
    x, v = torch.randn(6, 3, 2, 2), torch.randn(6, 5)
    pool.add(x=x, label=torch.arange(6.0), v=v)
    assert torch.equal(pool.columns["x"], x) and torch.equal(pool.columns["v"], v)
    batch = pool.sample(4, torch.Generator().manual_seed(0))
    assert torch.equal(batch["x"], x[batch["label"].long()]) and torch.equal(batch["v"], v[batch["label"].long()])


def test_replaced_entries_are_the_new_ones_and_the_others_stay():
    pool, before = filled(), filled().columns
    pool.replace(3, x=torch.full((2, 2), -1.0), t=torch.tensor([-3.0, -4.0]))
    assert len(pool) == 10 and pool.columns["t"].tolist() == [0, 1, 2, -3, -4, 5, 6, 7, 8, 9]
    assert (pool.columns["x"][3:5] == -1).all()
    others = [0, 1, 2, 5, 6, 7, 8, 9]
    assert torch.equal(pool.columns["x"][others], before["x"][others])


def test_entries_behind_the_last_cannot_be_replaced():
    with pytest.raises(ValueError, match="found 11 entries, expected at most 10"):
        filled().replace(9, x=torch.zeros(2, 2), t=torch.zeros(2))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"x": torch.zeros(1, 2)}, r"pool rows: found \['x'\], expected \['t', 'x'\]"),
        ({"x": torch.zeros(1, 2), "t": torch.zeros(2)}, "expected the same number in every column"),
        ({"x": torch.zeros(1, 3), "t": torch.zeros(1)}, r"pool column x: found \(1, 3\), expected \(1, 2\)"),
        ({"x": torch.zeros(11, 2), "t": torch.zeros(11)}, "found 11 entries, expected at most 10"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        Pool(10, {"x": (2,), "t": ()}).add(**rows)


def test_a_pool_cannot_be_sampled_before_it_is_full():
    pool = Pool(10, {"x": (2,), "t": ()})
    pool.add(x=torch.zeros(9, 2), t=torch.zeros(9))
    with pytest.raises(ValueError, match="found 9 entries, expected all 10$"):
        pool.sample(1, torch.Generator())


def test_a_saved_pool_draws_the_same(tmp_path):
    filled().save(tmp_path / "pool")
    loaded = Pool.load(tmp_path / "pool")
    assert len(loaded) == 10 and loaded.nbytes == filled().nbytes == 10 * 3 * 4
    one, other = (pool.sample(5, torch.Generator().manual_seed(3)) for pool in (filled(), loaded))
    assert torch.equal(one["x"], other["x"]) and torch.equal(one["t"], other["t"])


def test_a_file_that_is_no_pool_is_refused(tmp_path):
    (tmp_path / "pool").write_text("no pool")
    with pytest.raises(ValueError, match="no pool"):
        Pool.load(tmp_path / "pool")
