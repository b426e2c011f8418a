"""Joint stage: Qwen3 reads the prompt; adapters (or the whole small model), projections and Q-Formers learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nqf.config import BackboneConfig, Config, JointConfig
from nqf.data.splits import Cases
from nqf.evaluation.shares import ALONE, Shares
from nqf.interop.huggingface import check_embedding, load_qwen3
from nqf.interop.tensors import read_json, resolve_folder
from nqf.interop.tokenizer import Tokenizer, load_tokenizer, train_byte_bpe
from nqf.models.item_qformer import ItemOutput, ItemQFormer
from nqf.models.qwen3 import Qwen3Config
from nqf.models.rank_model import PromptIds, Reader
from nqf.ops.micro_batches import in_micro_batches
from nqf.pipelines.batches import History, HistoryBatch
from nqf.stages.artifacts import restore_best
from nqf.stages.item import device_fields, init_items, item_module, load_items, take_fields
from nqf.stages.mining import mined_negatives
from nqf.stages.rank import (
    RankParts,
    Trained,
    case_vectors,
    frozen_tables,
    history_data,
    init_rank,
    log_popularity,
    make_validation,
    rank_module,
    ranker_of,
)
from nqf.stages.ranker import ITEM_CHUNK
from nqf.stages.ranking_loss import batch_tables, ranking_loss
from nqf.stages.records import check_files
from nqf.stages.run import Run
from nqf.stages.stage import TRAINED, Stage
from nqf.stages.tokens import write_tokens
from nqf.stages.user import load_users
from nqf.training.mesh import barrier, is_primary, leaf_layout, make_mesh
from nqf.training.program import LossFn, Metrics, Program

TOKENS = "joint/tokens"
"""Where the tokens of an Item Q-Former that learns in this stage lie in the run folder."""


def small_qwen3(backbone: BackboneConfig, vocabulary: int, dtype: jnp.dtype) -> Qwen3Config:
    """Configuration of the small Qwen3 that is trained from scratch."""
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=backbone.width,
        intermediate_size=backbone.mlp_width,
        num_hidden_layers=backbone.layers,
        num_attention_heads=backbone.heads,
        num_key_value_heads=backbone.kv_heads,
        head_dim=backbone.head_dim,
        tie_word_embeddings=True,
        residual_dropout=backbone.dropout,
        dtype=dtype,
        param_dtype=jnp.float32,
        remat=backbone.remat,
        attention=backbone.attention,
    )


def with_adapters(pretrained: Qwen3Config, backbone: BackboneConfig, dtype: jnp.dtype) -> Qwen3Config:
    """Configuration of a pretrained Qwen3 that carries adapters."""
    return dataclasses.replace(
        pretrained,
        lora_rank=backbone.lora_rank,
        lora_alpha=backbone.lora_alpha,
        lora_dropout=backbone.lora_dropout,
        lora_targets=backbone.lora_targets,
        dtype=dtype,
        remat=backbone.remat,
        attention=backbone.attention,
    )


def run_tokenizer(run: Run) -> Tokenizer:
    """The backbone's tokenizer: the pretrained folder's, or the one that `train_joint` keeps with the run."""
    return load_tokenizer(run.config.joint.backbone.path or run.folder / "joint" / "tokenizer")


def catalogue_tokenizer(run: Run) -> Tokenizer:
    """A byte-level BPE trained on the catalogue's text."""
    catalogue = run.dataset.catalogue
    text = [field.name for field in catalogue.schema.fields if field.modality == "text"]
    columns = list(dict.fromkeys(["title", *text]))

    def texts() -> Any:
        yield run.config.joint.prompt.instruction
        for chunk in catalogue.chunks(columns, 16_384):
            for column in columns:
                yield from (value for value in chunk[column] if value)

    return train_byte_bpe(texts(), run.config.joint.backbone.vocabulary)


def joint_parts(
    run: Run,
    *,
    abstract: bool = False,
    trained: bool = False,
    mesh: Mesh | None = None,
    before: Cases | None = None,
) -> RankParts:
    """The rank model with its language model.

    Args:
      run: The run.
      abstract: Shapes stand for pretrained weights, for the User Q-Former and for the item tables; the tokenizer of a
        small Qwen3 is trained, not read.
      trained: The stage has finished, so the tokens are those of the Item Q-Former that learned in it, if it did.
      mesh: Where a pretrained base is read to, each part straight to its devices; the default device if None.
      before: As in `Run.tables`.
    """
    stage, dtype = run.config.joint, run.dtype
    backbone, frozen = stage.backbone, {}
    tokenizer = catalogue_tokenizer(run) if abstract and not backbone.path else run_tokenizer(run)
    if not backbone.path:
        qwen3 = small_qwen3(backbone, tokenizer.rows, dtype)
    elif abstract:
        tree = read_json(resolve_folder(backbone.path) / "config.json")
        qwen3 = with_adapters(Qwen3Config.from_hf(tree, dtype=dtype, param_dtype=dtype), backbone, dtype)
        frozen["qwen3"] = None
    else:
        where = None if mesh is None else lambda path, shape: leaf_layout("/".join(path), shape, mesh)
        loaded, frozen["qwen3"] = load_qwen3(backbone.path, dtype=dtype, sharding=where)
        check_embedding(resolve_folder(backbone.path), loaded, frozen["qwen3"], tokenizer)
        qwen3 = with_adapters(loaded.config, backbone, dtype)
    if stage.prompt.user_tokens and not stage.train_user_qformer:
        frozen["user_qformer"] = None if abstract else load_users(run).variables["params"]["user_qformer"]
    if abstract:
        tables = run.abstract_tables(stage.prompt.title_tokens)
    else:
        tokens = TOKENS if trained and stage.train_item_qformer else "tokens"
        tables = run.tables(run.folder / tokens, titles=title_ids(run, tokenizer), before=before)
    reader = reader_of(stage, qwen3)
    prompts = run.config.evaluation.batch_size * stage.prompt.history_items
    return RankParts(
        module=rank_module(run.config, tables, dtype, reader),
        tables=tables,
        frozen=frozen,
        prompt=prompt_ids(run.config, tokenizer),
        tokenizer=tokenizer,
        max_history=run.config.user.max_history,
        # Where the Qwen3 reads items, about as many tokens at a time as in a batch of users.
        item_chunk=min(ITEM_CHUNK, prompts) if reader.reads_items else ITEM_CHUNK,
    )


def reader_of(stage: JointConfig, qwen3: Qwen3Config) -> Reader:
    """How the joint stage's rank model reads with a Qwen3."""
    return Reader(
        qwen3=qwen3,
        prompt=stage.prompt,
        pretrained=bool(stage.backbone.path),
        reads_items=stage.candidates == "qwen3",
        dropout=0.0 if stage.backbone.path else stage.backbone.dropout,
    )


def prompt_ids(config: Config, tokenizer: Tokenizer) -> PromptIds:
    """Token ids that frame the injected tokens."""
    return PromptIds(
        instruction=np.asarray(tokenizer.encode([config.joint.prompt.instruction])[0], np.int32),
        placeholder=np.asarray(tokenizer.spare_ids(1)[0], np.int32),
        end=np.asarray(tokenizer.eos_id, np.int32),
    )


def title_tokens(titles: Sequence[str], words: int, tokenizer: Tokenizer | None) -> np.ndarray:
    """Token ids of some titles, int32 [titles, words], -1 in padding."""
    ids = np.full((len(titles), words), -1, np.int32)
    if words:
        assert tokenizer is not None, "titles are read by a language model alone"
        for row, tokens in enumerate(tokenizer.encode(list(titles), max_length=words)):
            ids[row, : len(tokens)] = tokens
    return ids


def title_ids(run: Run, tokenizer: Tokenizer) -> np.ndarray:
    """Token ids of every item's title, int32 [I, title_tokens], -1 in padding."""
    words = run.config.joint.prompt.title_tokens
    return np.concatenate(
        [
            title_tokens([title or "" for title in chunk["title"]], words, tokenizer)
            for chunk in run.dataset.catalogue.chunks(["title"], 16_384)
        ]
    )


def init_joint(run: Run, parts: RankParts) -> Any:
    """Fresh trainable parameters of the joint model, with an Item Q-Former's where it learns too."""
    params = init_rank(run, parts, seed=run.config.seed + 2, slots=run.config.joint.prompt.history_items)
    if run.config.joint.train_item_qformer:
        params["item_qformer"] = init_items(run, item_module(run))
    return params


def start_joint(run: Run, params: Any) -> Any:
    """Takes over what earlier stages learned: the tower, both Q-Formers and what the score has of its own.

    Initialization order: own checkpoint (in `fit`), earlier stages (here), pretrained base, scratch.
    """
    learned = load_users(run).variables["params"]
    taken = {name: learned[name] for name in ("tower", "user_qformer") if name in params["params"]}
    # The other parts read the pooled state, which is another one.
    own = ("log_scale", "decay", "transition", "transition_decay")
    if "head" in params["params"]:
        kept = {name: value for name, value in learned.get("head", {}).items() if name in own}
        if "tokens" in params["params"]["head"]:
            # Ranking begins as the user stage ended, and the language model has only to add to it.
            project, of_tokens = params["params"]["head"]["project"], learned["head"]["project"]
            kept["tokens"] = {"kernel": of_tokens["kernel"]}
            kept["project"] = {"kernel": jnp.zeros_like(project["kernel"]), "bias": of_tokens["bias"]}
        taken["head"] = {**params["params"]["head"], **kept}
    params = {**params, "params": {**params["params"], **taken}}
    return params | ({"item_qformer": load_items(run)[1]} if "item_qformer" in params else {})


def make_joint_loss(config: Config, parts: RankParts, items: ItemQFormer | None) -> LossFn:
    """Ranking loss of the joint stage; `items` is the Item Q-Former where it learns too."""
    stage = config.joint

    def loss_fn(params: Any, frozen: Any, batch: HistoryBatch, key: jax.Array) -> tuple[jax.Array, dict]:
        step_tables, rows = batch_tables(frozen["tables"], batch)
        item_key, model_key = jax.random.split(key)
        if items is not None:
            values, present = take_fields(frozen["fields"], jnp.maximum(rows, 0))
            qformer, rngs = {"params": params["item_qformer"]}, {"dropout": item_key}
            output = cast(ItemOutput, items.apply(qformer, values, present, deterministic=False, rngs=rngs))
            step_tables = step_tables.replace(tokens=output.tokens, vectors=output.vector)
        variables = dataclasses.replace(parts, frozen=frozen["params"]).variables(params)
        prompt = frozen["prompt"]

        def apply(method: str, key: jax.Array, *inputs: Any, **options: Any) -> jax.Array:
            rngs = {"dropout": key}
            read = parts.module.apply(variables, *inputs, **options, deterministic=False, rngs=rngs, method=method)
            return cast(jax.Array, read)

        def read_items(key: jax.Array, items: tuple) -> jax.Array:
            return apply("candidates", key, *items, prompt)

        def read_users(key: jax.Array, history: History) -> jax.Array:
            return apply("users", key, step_tables, learned, history, prompt, positions=batch.targets.shape[1])

        learned = apply("learned", model_key, step_tables, rows)
        # An item's prompt is about as long as an item in a user's prompt.
        items_at_a_time = stage.micro_batch * stage.prompt.history_items if stage.candidates == "qwen3" else 0
        items_key = jax.random.fold_in(model_key, 0)
        vectors = in_micro_batches(read_items, items_key, (step_tables, learned), items_at_a_time)
        users = in_micro_batches(read_users, model_key, batch.history, stage.micro_batch)
        ranking = ranking_loss(
            stage.loss,
            users,
            vectors,
            batch,
            learned_width=config.candidates.learned_width,
            text_RxT=step_tables.text,
            trained=step_tables.trained,
            log_popularity=frozen["log_popularity"],
        )
        return ranking, {}

    return loss_fn


def joint_program(run: Run, abstract: bool = False) -> Program:
    """What the joint stage trains."""
    config, stage = run.config, run.config.joint
    if not abstract and not stage.backbone.path:
        keep_tokenizer(run)
    parts = joint_parts(run, abstract=abstract, mesh=None if abstract else make_mesh(config.training.mesh))
    on_device = frozen_tables(run, parts.tables, stage.loss)
    items = item_module(run) if stage.train_item_qformer else None

    def frozen() -> Any:
        params = _frozen_shapes(run, parts) if abstract else parts.frozen
        tree = {"tables": on_device, "params": params, "prompt": parts.prompt, "log_popularity": log_popularity(run)}
        return tree | ({"fields": device_fields(run.cache)} if items is not None else {})

    def report(params: Any, metrics: Metrics) -> dict[str, Any]:
        # Where it validates, `fit` does so with the best parameters last, and the tokens on disk are theirs.
        if items is not None and config.data.refit:
            write_tokens(run, items, params["item_qformer"], run.folder / TOKENS)
        return {"trainable_parameters": sum(leaf.size for leaf in jax.tree.leaves(params)), **metrics}

    return Program(
        module=parts.module,
        init=lambda: init_joint(run, parts),
        start=lambda params: start_joint(run, params),
        frozen=frozen,
        variables=parts.variables,
        loss_fn=make_joint_loss(config, parts, items),
        data=lambda optim: history_data(
            run,
            stage.loss,
            optim,
            None if on_device else parts.tables,
            seed=config.seed + 2,
            max_history=config.user.max_history,
            positions=stage.prompt.history_items,
            item_dropout=config.user.item_dropout,
            given=None if abstract else mined_negatives(run),
        ),
        optim=stage.optim,
        seed=config.seed + 2,
        validate=lambda: _validation(run, parts, items),
        score="ndcg@10",
        report=report,
    )


def _validation(run: Run, parts: RankParts, items: ItemQFormer | None) -> Callable[[Any], Metrics] | None:
    ranker = ranker_of(run, parts)
    check = make_validation(run, ranker)
    if check is None or items is None:
        return None if check is None else lambda params: check(parts.variables(params))

    def validate(params: Any) -> Metrics:
        # The selection must see the tokens that the model in training makes, not those it started from.
        write_tokens(run, items, params["item_qformer"], run.folder / TOKENS)
        fresh = run.tables(run.folder / TOKENS, titles=parts.tables.titles)
        check_fresh = make_validation(run, dataclasses.replace(ranker, tables=fresh))
        assert check_fresh is not None, "the validation cases are the same"
        return check_fresh(parts.variables(params))

    return validate


def _frozen_shapes(run: Run, parts: RankParts) -> dict[str, Any]:
    whole = dataclasses.replace(parts, frozen={})
    everything = jax.eval_shape(lambda: init_joint(run, whole))["params"]
    return {name: everything[name] for name in parts.frozen}


def keep_tokenizer(run: Run) -> None:
    """Trains the small Qwen3's tokenizer, once, and keeps it with the stage."""
    folder = run.folder / "joint" / "tokenizer"
    if is_primary() and not (folder / "tokenizer.json").is_file():
        catalogue_tokenizer(run).save(folder)
    # Here and not where it is loaded: the evaluation loads it too, in the first process alone.
    barrier("tokenizer")


def load_joint(
    run: Run, *, text_weight: float = 0.0, new_item_weight: float | None = None, before: Cases | None = None
) -> Trained:
    """The trained joint model.

    Args:
      run: The run.
      before: As in `Run.tables`.
      text_weight: What the frozen similarity counts beyond what was learned (`nqf.stages.score`).
      new_item_weight: Factor of the frozen similarity of items that training never saw; None for the configuration's.
    """
    check_files(run.folder, "joint")
    parts = joint_parts(run, trained=True, before=before)
    module = parts.module.clone(text_weight=text_weight)
    if new_item_weight is not None:
        module = module.clone(new_item_weight=new_item_weight)
    parts = dataclasses.replace(parts, module=module)
    # Up to version 0.2 the score read the user tokens through the language model alone.
    params = restore_best(run.folder, "joint", lambda: init_joint(run, parts), zero=["params/head/tokens/kernel"])
    learned = params.get("item_qformer")
    return Trained(
        parts=parts,
        ranker=ranker_of(run, parts),
        variables=parts.variables(params),
        load_item_qformer=lambda: load_items(run) if learned is None else (item_module(run), learned),
    )


def joint_vectors(run: Run, cases: Cases, shares: Shares = ALONE) -> tuple[np.ndarray, np.ndarray]:
    """User and item vectors of the trained joint model, without what counts and texts add (`nqf.stages.score`)."""
    trained = load_joint(run, before=cases)
    return case_vectors(run, "joint", trained.ranker, trained.variables, cases, shares)


JOINT = Stage(
    name="joint",
    after=("user",),
    reads=("seed", "joint"),
    model_folders=("joint.backbone.path",),
    writes=(*TRAINED, "tokens", "tokenizer", "negatives.npy"),
    checked=("joint/checkpoints/BEST/**/*", "joint/t*/*.*"),
    program=joint_program,
    vectors=joint_vectors,
)
