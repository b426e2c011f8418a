"""UniRec's checkpoints against a PyTorch module of its published structure, and files that a stranger prepared."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest

import nqf

torch = pytest.importorskip("torch")
from tiny_qwen3 import SIZES, random_model  # noqa: E402
from torch import nn  # noqa: E402
from transformers import BertConfig  # noqa: E402

from nqf.interop.torch_file import CheckpointError  # noqa: E402
from nqf.models.qwen3 import Qwen3Config  # noqa: E402

pytestmark = pytest.mark.slow
FIELDS = ["average_rating", "main_image", "price", "title"]
WIDTH, FIELD_WIDTH, QUERIES, HEADS = 32, 24, 3, 4


class Attention(nn.Module):
    """BLIP-2's names: `self.query/key/value`, `output.dense`, `output.LayerNorm`."""

    def __init__(self, config: BertConfig, state_width: int):
        super().__init__()
        self.heads = config.num_attention_heads
        inner = nn.Module()
        inner.query = nn.Linear(config.hidden_size, config.hidden_size)
        inner.key = nn.Linear(state_width, config.hidden_size)
        inner.value = nn.Linear(state_width, config.hidden_size)
        self.add_module("self", inner)
        self.output = Residual(config, config.hidden_size)

    def forward(self, x, states, mask=None):
        inner = self.self
        q, k, v = (
            layer(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, source in ((inner.query, x), (inner.key, states), (inner.value, states))
        )
        logits = q @ k.mT / q.shape[-1] ** 0.5
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None, :].bool(), torch.finfo(torch.float32).min)
        return self.output((logits.softmax(-1) @ v).transpose(1, 2).flatten(-2), x)


class Residual(nn.Module):
    def __init__(self, config: BertConfig, inputs: int):
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, update, x):
        return self.LayerNorm(self.dense(update) + x)


class Up(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x):
        return nn.functional.gelu(self.dense(x))


class Layer(nn.Module):
    def __init__(self, config: BertConfig, index: int):
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        if index % config.cross_attention_freq == 0:
            self.crossattention = Attention(config, config.encoder_width)
        self.intermediate, self.output = Up(config), Residual(config, config.intermediate_size)
        self.intermediate_query, self.output_query = Up(config), Residual(config, config.intermediate_size)

    def forward(self, x, states, mask):
        x = self.attention(x, x)
        if hasattr(self, "crossattention"):
            x = self.crossattention(x, states, mask)
        return self.output_query(self.intermediate_query(x), x)


class Bert(nn.Module):
    """The Q-Former's BERT, its unused text branch included."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embeddings.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.embeddings.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        positions = torch.arange(config.max_position_embeddings).expand((1, -1))
        self.embeddings.register_buffer("position_ids", positions)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList([Layer(config, i) for i in range(config.num_hidden_layers)])

    def forward(self, queries, states, mask):
        x = self.embeddings.LayerNorm(queries)
        for layer in self.encoder.layer:
            x = layer(x, states, mask)
        return x


def bert_config(frequency: int) -> BertConfig:
    return BertConfig(
        vocab_size=11,
        max_position_embeddings=6,
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        intermediate_size=40,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.2,
        add_cross_attention=True,
        query_length=QUERIES,
        encoder_width=FIELD_WIDTH,
        cross_attention_freq=frequency,
    )


class Item(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = bert_config(2)
        self.query_embeddings = nn.Parameter(torch.randn(1, QUERIES, WIDTH))
        self.qformer = Bert(self.config)
        self.item_representation_head = nn.Linear(WIDTH, FIELD_WIDTH)
        self.reconstruction_head = nn.Linear(WIDTH, FIELD_WIDTH)
        self.field_projection = nn.Linear(QUERIES, len(FIELDS))

    def forward(self, fields, mask):
        outputs = self.qformer(self.query_embeddings.expand(len(fields), -1, -1), fields, mask)
        reconstructed = self.field_projection(self.reconstruction_head(outputs).mT).mT
        return outputs, self.item_representation_head(outputs.mean(1)), reconstructed


class User(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = bert_config(1)
        self.query_embeddings = nn.Parameter(torch.randn(1, QUERIES, WIDTH))
        self.qformer = Bert(self.config)
        self.prediction_head = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * FIELD_WIDTH)
        )

    def forward(self, tokens, mask):
        outputs = self.qformer(self.query_embeddings.expand(len(tokens), -1, -1), tokens, mask)
        return outputs, self.prediction_head(outputs.mean(1)).view(-1, 2, FIELD_WIDTH)


def randomized(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def item():
    return randomized(Item())


def item_checkpoint(model: Item) -> dict:
    return {"model_state_dict": model.state_dict(), "config": model.config, "field_names": FIELDS}


@pytest.fixture
def item_path(item, tmp_path):
    torch.save(item_checkpoint(item), tmp_path / "best_qformer_model.pth")
    return tmp_path / "best_qformer_model.pth"


def inputs(length: int):
    rng = np.random.default_rng(0)
    states = rng.normal(size=(5, length, FIELD_WIDTH)).astype(np.float32)
    return states, (np.arange(length)[None] <= np.arange(5)[:, None]).astype(np.int64)


def test_item_qformer_equals_the_reference(item, item_path) -> None:
    module, params, fields = nqf.interop.unirec.load_item_qformer(item_path)
    assert fields == tuple(FIELDS) and module.config.dropout == 0.2
    states, mask = inputs(len(FIELDS))
    with torch.no_grad():
        queries, representation, reconstructed = item(torch.tensor(states), torch.tensor(mask))
    out = module.apply({"params": params}, states, mask)
    np.testing.assert_allclose(out.query_outputs, queries, atol=1e-4)
    np.testing.assert_allclose(out.item_representation, representation, atol=1e-4)
    np.testing.assert_allclose(out.reconstructed_fields, reconstructed, atol=1e-4)
    assert np.abs(module.apply({"params": params}, states).query_outputs - out.query_outputs).max() > 1e-2


def test_reference_equals_the_item_qformer_from_our_weights(item, item_path) -> None:
    from nqf.interop.tensors import disassemble, linear
    from nqf.interop.unirec.checkpoint import qformer_table

    module, params, _ = nqf.interop.unirec.load_item_qformer(item_path)
    table = {"query_embeddings": ("query_embeddings",)} | qformer_table(
        module.config, prefix="qformer.", path=("qformer",)
    )
    for head in ("item_representation_head", "reconstruction_head", "field_projection"):
        table |= linear(head, (head,))
    params = {**params, "query_embeddings": params["query_embeddings"] * 2}
    state = {name: torch.tensor(array) for name, array in disassemble(table, params).items()}
    other = Item().eval()
    incompatible = other.load_state_dict(state, strict=False)
    assert not incompatible.unexpected_keys
    text = ("word_embeddings", "position_embeddings", "position_ids", ".intermediate.dense", ".output.")
    assert all(any(part in name for part in text) for name in incompatible.missing_keys)
    states, mask = inputs(len(FIELDS))
    with torch.no_grad():
        queries, _, _ = other(torch.tensor(states), torch.tensor(mask))
    np.testing.assert_allclose(module.apply({"params": params}, states, mask).query_outputs, queries, atol=1e-4)


def test_user_qformer_equals_the_reference(tmp_path) -> None:
    model = randomized(User())
    path = tmp_path / "best_user_qformer_model.pth"
    torch.save({"model_state_dict": model.state_dict(), "config": model.config, "epoch": 3, "loss": 0.5}, path)
    module, params = nqf.interop.unirec.load_user_qformer(path)
    states, mask = inputs(6)
    with torch.no_grad():
        queries, predicted = model(torch.tensor(states), torch.tensor(mask))
    out = module.apply({"params": params}, states, mask)
    np.testing.assert_allclose(out.query_outputs, queries, atol=1e-4)
    np.testing.assert_allclose(out.predicted_item_tokens, predicted, atol=1e-4)


def test_joint_folder_equals_the_reference(item, tmp_path) -> None:
    torch.save(item.state_dict(), tmp_path / "qformer_model.bin")
    module, params = nqf.interop.unirec.load_joint_qformer(tmp_path, heads=HEADS)
    states, mask = inputs(len(FIELDS))
    with torch.no_grad():
        queries, _, reconstructed = item(torch.tensor(states), torch.tensor(mask))
    out = module.apply({"params": params}, states, mask)
    np.testing.assert_allclose(out.query_outputs, queries, atol=1e-4)
    np.testing.assert_allclose(out.reconstructed_fields, reconstructed, atol=1e-4)


def test_whole_joint_folder(item, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    base = random_model(causal_lm=False)
    # As the reference does for its placeholders; peft then saves the whole table beside the adapter.
    base.resize_token_embeddings(SIZES["vocab_size"] + 4)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    adapted = peft.get_peft_model(base, peft.LoraConfig(**options))
    randomized(adapted)
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    torch.save(item.state_dict(), tmp_path / "qformer_model.bin")
    config = Qwen3Config.from_hf(base.config.to_dict() | {"vocab_size": SIZES["vocab_size"]})
    module, params, with_adapter, lora = nqf.interop.unirec.load_joint(tmp_path, config, heads=HEADS)
    np.testing.assert_array_equal(params["query_embeddings"], item.query_embeddings.detach())
    assert module.config.heads == HEADS
    assert (with_adapter.lora_rank, with_adapter.lora_targets) == (4, ("q_proj", "down_proj"))
    theirs = adapted.base_model.model.layers[1].mlp.down_proj.lora_B["default"].weight.detach().numpy()
    np.testing.assert_array_equal(lora["layers"]["mlp"]["down_proj"]["lora_b"][1], theirs.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_read_exactly(item, tmp_path, dtype) -> None:
    checkpoint = item_checkpoint(item)
    checkpoint["model_state_dict"] = {k: v.to(dtype) for k, v in checkpoint["model_state_dict"].items()}
    torch.save(checkpoint, tmp_path / "model.pth")
    _, params, _ = nqf.interop.unirec.load_item_qformer(tmp_path / "model.pth")
    expected = item.query_embeddings.detach().to(dtype).float().numpy()
    np.testing.assert_array_equal(params["query_embeddings"], expected)


def test_views_of_a_storage_are_read(item, tmp_path) -> None:
    checkpoint = item_checkpoint(item)
    state = checkpoint["model_state_dict"]
    weight = state["reconstruction_head.weight"]
    # A transposed slice that starts inside a larger storage.
    storage = torch.zeros(WIDTH + 2, FIELD_WIDTH)
    storage[2:] = weight.T
    state["reconstruction_head.weight"] = storage[2:].T
    torch.save(checkpoint, tmp_path / "model.pth")
    _, params, _ = nqf.interop.unirec.load_item_qformer(tmp_path / "model.pth")
    np.testing.assert_array_equal(params["reconstruction_head"]["kernel"], weight.T)


def test_all_mismatches_are_named_at_once(item, tmp_path) -> None:
    checkpoint = item_checkpoint(item)
    state = dict(checkpoint["model_state_dict"])
    del state["reconstruction_head.bias"]
    state["adapter.weight"] = torch.zeros(2)
    name = "qformer.encoder.layer.1.attention.self.key.weight"
    state[name] = torch.zeros(WIDTH, WIDTH + 1)
    torch.save({**checkpoint, "model_state_dict": state}, tmp_path / "model.pth")
    with pytest.raises(ValueError) as error:
        nqf.interop.unirec.load_item_qformer(tmp_path / "model.pth")
    for part in ("model.pth", "missing reconstruction_head.bias", "surplus adapter.weight", name, "(32, 33)"):
        assert part in str(error.value)


class Payload:
    def __init__(self, target: str):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_strangers_checkpoint_executes_nothing(item, tmp_path) -> None:
    target = tmp_path / "executed"
    with pytest.raises(FileExistsError):
        # The payload is real: Python's own unpickler runs it.
        pickle.loads(pickle.dumps(Payload(str(target))))
        pickle.loads(pickle.dumps(Payload(str(target))))
    target.rmdir()
    for protocol in (2, 4):
        torch.save({**item_checkpoint(item), "x": Payload(str(target))}, tmp_path / "x.pth", pickle_protocol=protocol)
        with pytest.raises(CheckpointError, match="mkdir"):
            nqf.interop.unirec.load_item_qformer(tmp_path / "x.pth")
        assert not target.exists()


def archive(path, program: bytes):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", program)
    return path


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (b"\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR.", "builtins.eval"),
        # Attributes of allowed names, and allowed names used in other ways.
        (b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.", r"OrderedDict\.__init__"),
        (b"\x80\x02ccollections\nOrderedDict\n}(X\x08\x00\x00\x00__call__K\x01ub.", "expected dict"),
        (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "REDUCE of collections.OrderedDict"),
        (b"\x80\x02(ios\nsystem\n.", "instruction INST"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        # Programs that no pickler writes.
        (b"\x80\x02a.", "damaged"),
        (b"\x80\x02t.", "damaged"),
        (b"\x80\x02h\x07.", "damaged"),
        (b"\x80\x02}]K\x01s.", "damaged"),
        (b"\x80\x02}", "damaged|cut off"),
        (b"no pickle at all", "damaged|instruction"),
    ],
)
def test_prepared_programs_are_refused(tmp_path, program, reason) -> None:
    with pytest.raises(CheckpointError, match=reason):
        nqf.interop.unirec.load_item_qformer(archive(tmp_path / "x.pth", program))


def test_damaged_files_are_refused(item_path, tmp_path) -> None:
    data = item_path.read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="zip format"):
        nqf.interop.unirec.load_item_qformer(tmp_path / "cut.pth")
    # One flipped bit in the queries: the archive's checksum tells.
    position = data.index(b"data/0") + 200
    (tmp_path / "flip.pth").write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
    with pytest.raises(CheckpointError, match=r"flip\.pth: damaged"):
        nqf.interop.unirec.load_item_qformer(tmp_path / "flip.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        nqf.interop.unirec.load_item_qformer(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="not one that"):
        with zipfile.ZipFile(tmp_path / "other.pth", "w") as file:
            file.writestr("readme.txt", "")
        nqf.interop.unirec.load_item_qformer(tmp_path / "other.pth")


def test_tensors_cannot_reach_beyond_their_storage(item_path, tmp_path) -> None:
    with zipfile.ZipFile(item_path) as source, zipfile.ZipFile(tmp_path / "short.pth", "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data[:4] if "/data/" in name else data)
    with pytest.raises(CheckpointError, match="beyond its storage"):
        nqf.interop.unirec.load_item_qformer(tmp_path / "short.pth")


def test_compressed_entries_are_refused(item_path, tmp_path) -> None:
    with (
        zipfile.ZipFile(item_path) as source,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="compressed"):
        nqf.interop.unirec.load_item_qformer(tmp_path / "bomb.pth")


def test_other_checkpoints_of_the_reference_are_told_apart(item, item_path, tmp_path) -> None:
    torch.save(item.state_dict(), tmp_path / "state.pth")
    with pytest.raises(CheckpointError, match="field_names"):
        nqf.interop.unirec.load_item_qformer(tmp_path / "state.pth")
    with pytest.raises(CheckpointError, match=r"prediction_head\.3\.bias"):
        nqf.interop.unirec.load_user_qformer(item_path)
    checkpoint = item_checkpoint(item)
    checkpoint["config"].hidden_act = "relu"
    torch.save(checkpoint, tmp_path / "relu.pth")
    checkpoint["config"].hidden_act = "gelu"
    with pytest.raises(CheckpointError, match="hidden_act 'relu'"):
        nqf.interop.unirec.load_item_qformer(tmp_path / "relu.pth")


def test_legacy_format_is_refused_with_advice(item, tmp_path) -> None:
    buffer = io.BytesIO()
    torch.save(item.state_dict(), buffer, _use_new_zipfile_serialization=False)
    (tmp_path / "old.pth").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="saved again"):
        nqf.interop.unirec.load_item_qformer(tmp_path / "old.pth")
