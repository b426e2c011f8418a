"""configs/unirec.yaml on files like the reference's: from its files to recommendations, and each loss by its formula.

The formulas are written here in torch after the reference's scripts; `docs/coming-from-unirec.md` tells what differs.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
import pytest

torch = pytest.importorskip("torch")
import unirec_files  # noqa: E402
from published import TOKENIZER, clip_folder, model_options, qwen3_folder  # noqa: E402

from nqf import embed, evaluate, train  # noqa: E402
from nqf.data.errors import DataError  # noqa: E402
from nqf.interop.unirec.embeddings import read_candidate_embeddings  # noqa: E402
from nqf.serving.recommender import Recommender  # noqa: E402
from nqf.stages import item, joint, user  # noqa: E402
from nqf.stages.run import Run, open_run  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.ci]
SMALL = """
    --item.qformer.width 32 --item.qformer.layers 2 --item.qformer.heads 2 --item.qformer.mlp-width 48
    --item.qformer.dropout 0 --item.optim.batch-size 64 --item.optim.epochs 2 --item.optim.validate-every 1
    --user.qformer.width 32 --user.qformer.layers 2 --user.qformer.heads 2 --user.qformer.mlp-width 48
    --user.qformer.queries 4 --user.qformer.dropout 0 --user.optim.batch-size 16 --user.optim.epochs 2
    --joint.backbone.lora-rank 4 --joint.backbone.lora-dropout 0 --joint.optim.epochs 3 --joint.optim.batch-size 8
    --joint.optim.validate-every 1 --evaluation.bootstrap 20 --evaluation.batch-size 16
""".split()


def trained(folder: Path, genuine: bool, samples: Any, patch: pytest.MonkeyPatch) -> tuple[Run, Path]:
    """The recipe by its name in the reference's folder, with the embeddings that the guide says how to make."""
    data = unirec_files.write(folder, samples=samples)
    base, clip = qwen3_folder(folder / "base", genuine), clip_folder(folder / "clip")
    patch.chdir(folder)
    items = data / "dict" / "All_Beauty_item_triplet_dict.json"
    embeddings = data / "embeddings" / "all_beauty_item_embedding_qwen3_0.6B.json"
    embed.main(["--model", str(base), "--input", str(items), "--output", str(embeddings)])
    train.main(["--config", "unirec", "--run", "run", *model_options(base, clip), *SMALL])
    return open_run(folder / "run"), data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    with pytest.MonkeyPatch.context() as patch:
        return trained(tmp_path_factory.mktemp("unirec"), bool(TOKENIZER), unirec_files.old_users, patch)


def samples_of(data: Path, part: str) -> list[dict[str, Any]]:
    return json.loads((data / "data" / f"Amazon_All_Beauty_20_{part}.json").read_text())


def test_item_loss_is_the_reference_s(made: tuple[Run, Path]) -> None:
    run, _ = made
    program = item.item_program(run)
    batch, params = program.data(program.optim).batches[0], item.init_items(run, program.module)
    loss, metrics = program.loss_fn(params, program.frozen(), batch, jax.random.key(0))
    made_of = {}
    for name in ("anchors", "positives", "negatives"):
        values, present = item.gather_fields(run.cache, getattr(batch, name))
        made_of[name] = values, present, program.module.apply({"params": params}, values, present)
    values, present, output = made_of["anchors"]
    # Over fields of one width it is ((r - x) ** 2 * mask[..., None]).sum() / mask.sum(); these have their own widths.
    squares = [
        ((torch.tensor(np.asarray(output.reconstructions[name])) - torch.tensor(values[name])) ** 2).sum(1)
        for name in values
    ]
    masks = [torch.tensor(present[name]) for name in values]
    reconstruction = sum((s * m).sum() for s, m in zip(squares, masks, strict=True)) / sum(m.sum() for m in masks)
    vectors = [torch.tensor(np.asarray(made_of[name][2].vector)) for name in made_of]
    contrastive = torch.nn.TripletMarginLoss(margin=0.5)(*vectors)
    np.testing.assert_allclose(float(metrics["reconstruction"]), float(reconstruction), rtol=1e-5)
    np.testing.assert_allclose(float(metrics["contrastive"]), float(contrastive), rtol=1e-5)
    np.testing.assert_allclose(float(loss), float(reconstruction + 0.25 * contrastive), rtol=1e-5)


def test_user_loss_is_the_reference_s(made: tuple[Run, Path]) -> None:
    run, _ = made
    program = user.user_program(run)
    batch, parts = program.data(program.optim).batches[0], user.user_parts(run)
    params = user.init_user(run, parts)
    loss, _ = program.loss_fn(params, program.frozen(), batch, jax.random.key(0))
    rows = np.arange(len(parts.tables.has_text))
    predicted = parts.module.apply(
        {"params": params}, parts.tables, rows, batch.history, None, positions=batch.targets.shape[1]
    )[2]
    kept = batch.targets >= 0
    true = torch.tensor(np.asarray(parts.tables.tokens, np.float32)[batch.targets[kept]])
    expected = torch.nn.MSELoss()(torch.tensor(np.asarray(predicted)[kept]), true)
    np.testing.assert_allclose(float(loss), float(expected), rtol=1e-5)


def test_joint_loss_is_the_reference_s(made: tuple[Run, Path]) -> None:
    run, data = made
    program = joint.joint_program(run)
    parts, batches = joint.joint_parts(run), program.data(program.optim)
    samples = {sample["user_id"]: sample for sample in samples_of(data, "train")}
    ids, known = run.dataset.catalogue.item_ids, read_candidate_embeddings(run.config.data.candidates or "")
    vector_of = dict(zip(known[0], known[1], strict=True))
    # Every sample whose target is not held out is one example.
    assert len(batches.users) == len(samples) - len(run.dataset.split.valid.users)
    params = joint.init_joint(run, parts)
    assert "head" not in params["params"] and "tower" not in params["params"]
    batch, users = batches.batches[0], batches.users[batches.examples[0]]
    loss, _ = program.loss_fn(params, program.frozen(), batch, jax.random.key(0))
    # The tokens are those of the Item Q-Former in training; the vectors are pooled by the model itself.
    fields = item.gather_fields(run.cache, np.arange(len(ids)))
    output = item.item_module(run).apply({"params": params["item_qformer"]}, *fields)
    tables = parts.tables.replace(tokens=output.tokens, vectors=output.vector)
    history = batch.history.replace(items=np.where(batch.history.items >= 0, batch.rows[batch.history.items], -1))
    learned = np.zeros((len(ids), 0), np.float32)
    states, _ = parts.module.apply(
        parts.variables(params), tables, learned, history, parts.prompt, 1, True, method="_pooled"
    )
    pooled = states[:, 0]
    positives, negatives = [], []
    for row in users:
        sample = samples[run.dataset.interactions.user_ids[row]]
        positives.append(vector_of[sample["ground_truth"]])
        others = [vector_of[item] for item in sample["candidate"] if item != sample["ground_truth"]]
        negatives.append(others[:10])
    unit = torch.nn.functional.normalize
    user_vectors = unit(torch.tensor(np.asarray(pooled, np.float32)), dim=-1)
    positive = (user_vectors * unit(torch.tensor(np.array(positives)), dim=-1)).sum(-1) / 0.07
    negative = torch.einsum("md,mcd->mc", user_vectors, unit(torch.tensor(np.array(negatives)), dim=-1)) / 0.07
    losses = -positive + torch.logsumexp(torch.cat([positive[:, None], negative], dim=1), dim=1)
    # The embeddings are kept in float16, as all frozen vectors are.
    np.testing.assert_allclose(float(loss), float(losses.mean()), rtol=1e-3)


def test_the_legacy_protocol_ranks_the_samples_candidates(made: tuple[Run, Path]) -> None:
    run, data = made
    evaluate.main([str(run.folder), "--protocol", "legacy"])
    results = json.loads((run.folder / "eval" / "test-legacy" / "results.json").read_text())
    found = joint.joint_vectors(run, run.dataset.split.test)
    ids, bounds = list(run.dataset.catalogue.item_ids), []
    test = {sample["user_id"]: sample for sample in samples_of(data, "test")}
    for vector, row in zip(found[0], run.dataset.split.test.users, strict=True):
        sample = test[run.dataset.interactions.user_ids[row]]
        others = [ids.index(item) for item in sample["candidate"] if item != sample["ground_truth"]]
        similarities = torch.tensor(found[1][[ids.index(sample["ground_truth"]), *others]] @ vector)
        # Scores that are apart by rounding alone may change places.
        above = [(similarities[1:] > similarities[0] + way * 1e-5).sum().item() for way in (-1, 1)]
        bounds.append([1 / (1 + count) for count in above])
    worst, best = np.mean(bounds, axis=0)
    found_mrr = results["models"]["joint"]["all"]["mrr"][0]
    np.testing.assert_allclose(found_mrr, (worst + best) / 2, atol=(best - worst) / 2 + 1e-9)
    assert best - worst < 1e-3


def test_it_recommends(made: tuple[Run, Path]) -> None:
    run, _ = made
    recommender = Recommender.load(run.folder)
    known = recommender.recommend(user=run.dataset.interactions.user_ids[0], k=5)
    assert len(known) == 5 and known["score"].is_finite().all()
    history = list(run.dataset.catalogue.item_ids[:6])
    # Of somebody whom training never saw: what is known of the interactions changes what is recommended.
    bare = recommender.recommend(history=history, k=20)
    told: dict[str, Any] = {
        "times": [1_600_000_000 + 86_400 * day for day in range(6)],
        "ratings": [1.0, 5.0, 1.0, 5.0, 1.0, 5.0],
        "reviews": ["Not for me"] * 6,
    }
    for name, values in told.items():
        other = recommender.recommend(history=history, k=20, **{name: values})
        scores = bare.join(other, on="item_id", suffix="_told").select("score", "score_told")
        assert (scores["score"] - scores["score_told"]).abs().max() > 1e-4, name
    with pytest.raises(DataError, match=r"data\.candidates, which say nothing of new or changed items"):
        recommender.add_items(pl.DataFrame({"item_id": ["new"], "title": ["A soap bar with mint"]}))
