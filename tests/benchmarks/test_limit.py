"""The closed forms of what methods cost, held against what XLA counts."""

import pytest

from benchmarks import limit, limit_shown
from benchmarks import limit_least as least

TOKENS, WIDTH, RANK = 512, 256, 16


@pytest.fixture(scope="module")
def here():
    return limit.cell(TOKENS, WIDTH)


def test_the_floor_is_two_passes_over_every_weight(here):
    """Beside the products there are norms, a softmax and a gate."""
    products = least.floor(TOKENS, WIDTH)
    assert 1 < here.once.flops / products < 1.01
    forward = least.floor(TOKENS, WIDTH, passes=2) - products
    assert 1 < here.forward.flops / forward < 1.01


@pytest.mark.parametrize("method", least.ADAPTED)
def test_an_adapter_costs_what_its_closed_form_says(method, here):
    row = here.record("grid", method, RANK, "adapted")
    assert not limit.broken([row])
    more = row["flops_ratio"] - row["least_flops_ratio"]
    assert more >= 0, "less than the least"
    # One thin product more, of the square weights alone, would be seen.
    planted = 4 * 2 * TOKENS * RANK * WIDTH / row["floor_flops"]
    (found,) = limit.broken([row | {"flops_ratio": row["flops_ratio"] + planted}])
    assert found.startswith(f"{method} adapted, rank 16, width 256, 512 tokens: ")
    (found,) = limit.broken([row | {"bytes_ratio": 1.06 * row["least_bytes_ratio"]}])
    assert "x the floor's bytes, at most" in found


@pytest.mark.parametrize("method", ["lora", "hra"])
def test_merging_costs_what_its_closed_form_says(method, here):
    row = here.record("merging", method, RANK, "merged")
    assert not limit.broken([row])
    assert row["flops_ratio"] >= row["least_flops_ratio"]


def test_loha_goes_the_cheaper_way_on_both_sides(here):
    before, after = limit.loha_ways(TOKENS, WIDTH, WIDTH)
    assert after["rank"] == before["rank"] + 1
    assert before["chosen_flops"] == before["factors_flops"] < before["built_flops"]
    assert after["chosen_flops"] == after["built_flops"] < after["factors_flops"]
    assert before["rank"] < limit_shown.loha_cross([before, after]) < after["rank"]
    assert not limit.broken([before, after])
    (found,) = limit.broken([before | {"chosen_flops": before["built_flops"]}])
    assert "x the FLOPs of the other way" in found


def test_ranks_at_which_lines_cross():
    """By trying every rank."""
    width, ranks = 64, range(1, 65)
    for tokens in (16, 64, 512, 4096):
        for i, o in ((64, 64), (64, 176)):
            costs = {
                r: (least.loha_factors(tokens, i, o, r), least.merged_loha(tokens, i, o, r))
                for r in ranks
            }
            found = [r for r, (factors, built) in costs.items() if built.flops < factors.flops]
            assert least.fused_rank(tokens, i, o) == (found[0] if found else None)
        for method in ("lora", "dora", "hra"):
            shapes = least.weights(width).values()
            adapted, merged = (
                {r: sum(form(tokens, i, o, r).flops for i, o in shapes) for r in ranks}
                for form in (least.ADAPTED[method]["q"], least.MERGED[method]["q"])
            )
            found = [r for r in ranks if merged[r] < adapted[r] and r <= width // 2]
            assert least.merged_rank(method, tokens, width) == (found[0] if found else None)
            floor = least.floor(tokens, width)
            found = [r for r in ranks if adapted[r] > 0.1 * floor]
            assert least.dear_rank(method, tokens, width) == (found[0] if found else None)
    assert least.merged_rank("lora", 16, width) is None
    assert least.merged_rank("lora", 4096, width) is not None


def test_tokens_below_which_products_with_the_weight_are_dear():
    shapes, rank = least.weights(1024).values(), 8
    products = sum(6 * rank * (i + o) for i, o in shapes)
    for method, often in (("dora", 1), ("hra", 2)):
        reading = sum(often * least.product(rank, i, o).flops for i, o in shapes)
        found = [tokens for tokens in range(1, 2000) if tokens * products >= reading]
        assert found[0] - 1 < least.reading_tokens(method, 1024) <= found[0]


def records():
    """What would be measured, were nothing but the closed forms in it."""
    rows = []

    def record(what, method, way, tokens, width, rank):
        passes = 2 if method == "xlora" else 1
        floor = least.floor(tokens, width, passes)
        forms = least.MERGED if way == "merged" else least.ADAPTED
        added = least.added(forms[method], tokens, width, rank)
        ratios = {"flops": 1 + added.flops / floor, "bytes": 1 + 4 * added.moved / floor}
        row = {f"{part}{k}_ratio": x for k, x in ratios.items() for part in ("", "least_")}
        row |= {"what": what, "method": method, "way": way, "floor_flops": floor}
        row |= {"floor_bytes": floor, "floor": f"{passes}", "rank": rank}
        rows.append(row | {"tokens": tokens, "width": width})

    for width in (256, 512):
        for tokens in (512, 2048):
            for method in least.ADAPTED:
                for rank in (4, 16)[: 1 if method == "ia3" else 2]:
                    record("grid", method, "adapted", tokens, width, rank)
                if method != "ia3":
                    rank = least.dear_rank(method, tokens, width)
                    record("dear", method, "adapted", tokens, width, rank)
            rank = least.merged_rank("lora", tokens, width)
            for way in ("adapted", "merged") if rank else ():
                record("merging", "lora", way, tokens, width, rank)
            after = least.fused_rank(tokens, width, width)
            for rank in (after - 1, after):
                ways = {
                    f"{way}_flops": form(tokens, width, width, rank).flops
                    for way, form in (
                        ("factors", least.loha_factors),
                        ("built", least.merged_loha),
                    )
                }
                row = {"what": "loha", "tokens": tokens, "in": width, "out": width, "rank": rank}
                rows.append(row | ways | {"chosen_flops": min(ways.values())})
    return rows


def test_tables_and_pictures(tmp_path):
    rows = records()
    assert not limit.broken(rows)
    text = limit.tables(rows)
    (row,) = limit_shown.where(rows, what="grid", method="hra", tokens=512, width=256, rank=16)
    assert f"| HRA | 1 | 512 | {row['flops_ratio']:.4f} ({row['flops_ratio']:.4f}) |" in text
    rank = least.merged_rank("lora", 512, 256)
    assert f"| LoRA | 512 | {rank}: 1.00" in text
    assert "| never |" in text
    for method in ("dora", "hra"):
        found = limit_shown.reading_cross(limit_shown.where(rows, what="grid"), method, 256)
        assert abs(found / least.reading_tokens(method, 256) - 1) < 0.25
    pictures = limit.plots(rows, tmp_path)
    assert [path.name for path in pictures] == [
        "limit_flops.png",
        "limit_bytes.png",
        "limit_crossings.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
