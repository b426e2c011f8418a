"""Joint stage: Qwen3 reads the prompt; adapters (or the whole small model), projections and Q-Formers learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nqf.config import BackboneConfig, Config
from nqf.interop.huggingface import check_embedding, load_qwen3
from nqf.interop.tensors import resolve_folder
from nqf.interop.tokenizer import Tokenizer, load_tokenizer, train_byte_bpe
from nqf.models.item_qformer import ItemQFormer
from nqf.models.qwen3 import Qwen3Config
from nqf.models.recommender import ItemTables, JointModel, PromptIds
from nqf.models.user_qformer import History
from nqf.ops.micro_batches import in_micro_batches
from nqf.pipelines.histories import HistoryBatch
from nqf.stages.artifacts import StageError, read_artifact
from nqf.stages.item import device_fields, empty_fields, item_module, load_items, take_fields, write_tokens
from nqf.stages.mining import mined_negatives
from nqf.stages.ranker import ITEM_CHUNK, Ranker, batch_tables, compute_dtype, make_ranker, ranking_loss
from nqf.stages.run import Run
from nqf.stages.user import (
    empty_history,
    frozen_tables,
    history_data,
    load_users,
    log_popularity,
    make_validation,
)
from nqf.training.checkpoint import restore_params
from nqf.training.loop import LossFn, fit
from nqf.training.mesh import barrier, is_primary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joint:
    """The joint model of a run, without trained parameters.

    Attributes:
      module: The Linen module.
      frozen: Frozen parameters of the module: a pretrained base under `qwen3`, a User Q-Former that does not learn
        on under `user_qformer`.
      prompt: Token ids of the prompt.
      tables: Host tables with titles.
      tokenizer: The tokenizer.
    """

    module: JointModel
    frozen: dict[str, Any]
    prompt: PromptIds
    tables: ItemTables
    tokenizer: Tokenizer


def variables_of(params: Any, frozen: dict[str, Any]) -> dict[str, Any]:
    """Linen variables from the trainable tree (`params` and, beside a pretrained base, `lora`) and the frozen one."""
    variables = {"params": {**params["params"], **frozen}}
    if "lora" in params:
        variables["lora"] = params["lora"]
    return variables


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


def build_joint(run: Run, tokens_folder: Path) -> Joint:
    """Assembles the joint model of a run.

    Args:
      run: The run.
      tokens_folder: Folder of the item tokens it reads.
    """
    config, backbone = run.config, run.config.joint.backbone
    dtype = compute_dtype(config.training.dtype)
    tokenizer = run_tokenizer(run)
    frozen: dict[str, Any] = {}
    if backbone.path:
        loaded, frozen["qwen3"] = load_qwen3(backbone.path, dtype=dtype)
        check_embedding(resolve_folder(backbone.path), loaded, frozen["qwen3"], tokenizer)
        qwen3 = with_adapters(loaded.config, backbone, dtype)
    else:
        qwen3 = small_qwen3(backbone, tokenizer.rows, dtype)
    if config.joint.prompt.user_tokens and not config.joint.train_user_qformer:
        frozen["user_qformer"] = load_users(run)[1]["params"]["user_qformer"]
    tables = run.tables(tokens_folder, titles=title_ids(run, tokenizer))
    module = JointModel(
        config=config,
        backbone=qwen3,
        items=len(tables.has_text),
        item_tokens=tables.tokens.shape[1:],
        dtype=dtype,
    )
    prompt = prompt_ids(config, tokenizer)
    return Joint(module=module, frozen=frozen, prompt=prompt, tables=tables, tokenizer=tokenizer)


def prompt_ids(config: Config, tokenizer: Tokenizer) -> PromptIds:
    """Token ids that frame the injected tokens."""
    return PromptIds(
        instruction=np.asarray(tokenizer.encode([config.joint.prompt.instruction])[0], np.int32),
        placeholder=np.asarray(tokenizer.spare_ids(1)[0], np.int32),
        end=np.asarray(tokenizer.eos_id, np.int32),
    )


def title_tokens(titles: Sequence[str], words: int, tokenizer: Tokenizer) -> np.ndarray:
    """Token ids of some titles, int32 [titles, words], -1 in padding."""
    ids = np.full((len(titles), words), -1, np.int32)
    if words:
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


def init_joint(run: Run, joint: Joint) -> Any:
    """Fresh trainable parameters of the joint model: `params` without what is frozen, and `lora` beside a base."""

    rows = np.zeros(1, np.int32)
    inputs = (joint.tables.take(rows), rows, empty_history(run, run.config.joint.prompt.history_items), joint.prompt)

    def init(inputs: tuple) -> Any:
        variables = joint.module.init(jax.random.key(run.config.seed + 2), *inputs, positions=1)
        # Under jit the base that `init` draws is never computed: its only use is dropped here.
        params = {name: tree for name, tree in variables["params"].items() if name not in joint.frozen}
        return {"params": params} | ({"lora": variables["lora"]} if "lora" in variables else {})

    return jax.jit(init)(inputs)


def joint_ranker(run: Run, joint: Joint) -> Ranker:
    """The joint model's ranker."""
    # Where the Qwen3 reads items, about as many tokens at a time as in a batch of users.
    prompts = run.config.evaluation.batch_size * run.config.joint.prompt.history_items
    return make_ranker(
        joint.module,
        joint.tables,
        extra=(joint.prompt,),
        max_history=run.config.user.max_history,
        batch_size=run.config.evaluation.batch_size,
        item_chunk=min(ITEM_CHUNK, prompts) if run.config.joint.candidates == "qwen3" else ITEM_CHUNK,
    )


def _start_from_user_stage(run: Run, params: Any) -> Any:
    """Takes over what the user stage learned: the tower, the User Q-Former and what the score has of its own.

    Initialization order: own checkpoint (in `fit`), previous stage (here), pretrained base, scratch.
    """
    learned = load_users(run)[1]["params"]
    taken = {name: learned[name] for name in ("tower", "user_qformer") if name in params["params"]}
    # The other parts read the pooled state, which is another one.
    own = ("log_scale", "decay", "transition", "transition_decay")
    kept = {name: value for name, value in learned["head"].items() if name in own}
    taken["head"] = {**params["params"]["head"], **kept}
    return {**params, "params": {**params["params"], **taken}}


def make_joint_loss(config: Config, module: JointModel, items: ItemQFormer | None) -> LossFn:
    """Ranking loss of the joint stage; `items` is the Item Q-Former where it goes on learning."""
    stage = config.joint

    def loss_fn(params: Any, frozen: Any, batch: HistoryBatch, key: jax.Array) -> tuple[jax.Array, dict]:
        step_tables, rows = batch_tables(frozen["tables"], batch)
        item_key, model_key = jax.random.split(key)
        if items is not None:
            values, present = take_fields(frozen["fields"], jnp.maximum(rows, 0))
            output = items.apply(
                {"params": params["item_qformer"]},
                values,
                present,
                deterministic=False,
                rngs={"dropout": item_key},
            )
            step_tables = step_tables.replace(tokens=output.tokens, vectors=output.vector)
        variables, prompt = variables_of(params, frozen["params"]), frozen["prompt"]

        def apply(method: str, key: jax.Array, *inputs: Any, **options: Any) -> jax.Array:
            rngs = {"dropout": key}
            return module.apply(variables, *inputs, **options, deterministic=False, rngs=rngs, method=method)

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
            learned_width=config.candidates.width,
            text_RxT=step_tables.text,
            trained=step_tables.trained,
            log_popularity=frozen["log_popularity"],
        )
        return ranking, {}

    return loss_fn


def train_joint(run: Run) -> dict[str, Any]:
    """Runs the joint stage."""
    config = run.config
    stage = config.joint
    for wanted, why in (
        (stage.train_item_qformer, "joint.train_item_qformer re-encodes the items of each batch"),
        (stage.candidates == "qwen3", "joint.candidates: qwen3 reads a prompt for each item of a batch"),
        (stage.mining.count, "joint.mining adds negatives to drawn ones"),
    ):
        if wanted and stage.loss.negatives == "full":
            raise StageError(f"{why}, so joint.loss.negatives cannot be 'full'; set it to 'sampled' or 'in-batch'")
    if not stage.backbone.path:
        folder = run.folder / "joint" / "tokenizer"
        if is_primary() and not (folder / "tokenizer.json").is_file():
            catalogue_tokenizer(run).save(folder)
        # Here and not where it is loaded: the evaluation loads it too, in the first process alone.
        barrier("tokenizer")
    joint = build_joint(run, run.folder / "tokens")
    params = _start_from_user_stage(run, init_joint(run, joint))
    on_device = frozen_tables(run, joint.tables, stage.loss)
    frozen = {
        "tables": on_device,
        "params": joint.frozen,
        "prompt": joint.prompt,
        "log_popularity": log_popularity(run),
    }
    items: ItemQFormer | None = None
    if stage.train_item_qformer:
        items, params["item_qformer"] = load_items(run)
        frozen["fields"] = device_fields(run.cache)

    ranker = joint_ranker(run, joint)
    check, tokens_folder = make_validation(run, ranker), run.folder / "joint" / "tokens"

    def validate(params: Any) -> dict[str, float]:
        variables = variables_of(params, joint.frozen)
        if items is None:
            return check(variables)
        # The selection must see the tokens that the model in training makes, not those it started from.
        write_tokens(run, items, params["item_qformer"], tokens_folder)
        fresh = run.tables(tokens_folder, titles=joint.tables.titles)
        return make_validation(run, dataclasses.replace(ranker, tables=fresh))(variables)

    tables, given = None if on_device else joint.tables, mined_negatives(run)
    result = fit(
        folder=run.folder,
        stage="joint",
        data=history_data(run, stage.loss, stage.optim, tables, config.seed + 2, given),
        optim=stage.optim,
        params=params,
        frozen=frozen,
        loss_fn=make_joint_loss(config, joint.module, items),
        validate=validate if check else None,
        score="ndcg@10",
        seed=config.seed + 2,
        training=config.training,
        console=run.console,
        profile=run.profile,
    )
    # Where it validates, `fit` does so with the best parameters last, and the tokens on disk are theirs.
    if items is not None and check is None:
        write_tokens(run, items, result.params["item_qformer"], tokens_folder)
    return {
        "best_step": result.best_step,
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "items_per_second": round(result.items_per_second, 1),
        "trainable_parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        **result.metrics,
    }


def load_joint(run: Run) -> tuple[Joint, Ranker, Any, tuple[ItemQFormer, Any]]:
    """The trained joint model: its parts, its ranker, its best variables, and the Item Q-Former it goes with."""
    trained_items = run.config.joint.train_item_qformer
    joint = build_joint(run, run.folder / "joint" / "tokens" if trained_items else run.folder / "tokens")
    shapes = jax.eval_shape(lambda: init_joint(run, joint))
    if trained_items:
        module = item_module(run)
        shapes["item_qformer"] = jax.eval_shape(module.init, jax.random.key(0), *empty_fields(run.cache, 1))["params"]
    step = read_artifact(run.folder, "joint").result["best_step"]
    params = restore_params(run.folder / "joint" / "checkpoints", step, shapes)
    items = (module, params["item_qformer"]) if trained_items else load_items(run)
    return joint, joint_ranker(run, joint), variables_of(params, joint.frozen), items
