"""Influence scores by kronfluence, dattri and bergson, called as their documentation shows."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.influence.work import Work, answer_losses, by_length, left_padded, right_padded
from curvlib.batches import IGNORED, Batch, Example, at_least_float32
from curvlib.curvature.kfac import linear_maps
from curvlib.influence.gradients import BATCH_SIZE

SEED = 0  # of the labels that are drawn from the model


def kronfluence(model: nn.Module, work: Work) -> Tensor:
    """Score with kronfluence's EK-FAC: one pass for the covariances, one for the eigenvalues, one for the scores.

    All queries' gradients are kept at once, so that the training chats are read once.
    """
    analyzer: Any = importlib.import_module("kronfluence.analyzer")
    arguments: Any = importlib.import_module("kronfluence.arguments")
    loaders: Any = importlib.import_module("kronfluence.utils.dataset")
    task = kronfluence_task(list(linear_maps(model)))
    (chats, place), (asked, asked_place), (seen, _) = map(by_length, (work.examples, work.queries, work.seen))
    torch.manual_seed(SEED)
    device = next(model.parameters()).device
    prepared = analyzer.prepare_model(model, task)
    run = analyzer.Analyzer(
        "chats", prepared, task, cpu=device.type == "cpu", disable_tqdm=True, output_dir=str(work.folder)
    )
    run.set_dataloader_kwargs(loaders.DataLoaderKwargs(collate_fn=left_padded))
    run.fit_all_factors("ekfac", seen, BATCH_SIZE, factor_args=arguments.FactorArguments(strategy="ekfac"))
    wanted = arguments.ScoreArguments(
        damping_factor=work.peer_damping,
        query_gradient_accumulation_steps=math.ceil(len(asked) / BATCH_SIZE),
    )
    sizes = {"per_device_query_batch_size": BATCH_SIZE, "per_device_train_batch_size": BATCH_SIZE}
    run.compute_pairwise_scores("scores", "ekfac", asked, chats, score_args=wanted, **sizes)
    scores = run.load_pairwise_scores("scores")["all_modules"]
    return work.from_peer(scores[asked_place][:, place])


def kronfluence_task(modules: list[str]) -> Any:
    """Return kronfluence's Task: summed losses of training chats, mean losses of queries, over these linear layers."""
    base: Any = importlib.import_module("kronfluence.task").Task

    class ChatTask(base):  # type: ignore[misc]
        def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
            return answer_losses(model, Batch(**batch), sample=sample).sum()

        def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
            chats = Batch(**batch)
            losses = answer_losses(model, chats)
            return (losses / (chats.labels != IGNORED).sum(dim=1).to(losses)).sum()

        def get_influence_tracked_modules(self) -> list[str]:
            return modules

        def get_attention_mask(self, batch: dict[str, Tensor]) -> Tensor:
            return batch["attention_mask"]

    return ChatTask()


def dattri_loss(model: nn.Module, mean: bool, parameters: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
    """Return one chat's loss, summed or averaged over its answer tokens, as torch.func wants it."""
    ids, labels = data[0], data[1].flatten(0, -2)[:, 1:]
    called = torch.func.functional_call(model, parameters, kwargs={"input_ids": ids.flatten(0, -2), "use_cache": False})
    logits = at_least_float32(called.logits[:, :-1])
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="mean" if mean else "sum")


def dattri(method: str, model: nn.Module, work: Work) -> Tensor:
    """Score with dattri's attributor of this name; each batch of training chats makes it differentiate all queries.

    DataInf (Kwon et al., arXiv 2310.00902) averages the inverses of single chats' damped outer products, layer by
    layer, with the given answers. It keeps the gradients of all chats that the curvature is estimated from.
    """
    attributors: Any = importlib.import_module("dattri.algorithm.influence_function")
    tasks: Any = importlib.import_module("dattri.task")
    device = next(model.parameters()).device
    task = tasks.AttributionTask(
        loss_func=partial(dattri_loss, model, False),
        target_func=partial(dattri_loss, model, True),
        model=model,
        checkpoints=[{}],
        checkpoints_load_func=lambda model, _: model,
    )
    if method == "datainf":
        run = attributors.IFAttributorDataInf(task, device=str(device), regularization=work.peer_damping)
    else:
        names = list(linear_maps(model))
        run = attributors.IFAttributorEKFAC(task, module_name=names, device=str(device), damping=work.peer_damping)
    (chats, place), (asked, asked_place), (seen, _) = map(by_length, (work.examples, work.queries, work.seen))
    make: Any = partial(DataLoader, batch_size=BATCH_SIZE, collate_fn=right_padded)
    run.cache(make(seen))
    return work.from_peer(run.attribute(make(chats), make(asked)).detach().T[asked_place][:, place])


def bergson(model: Any, work: Work) -> Tensor:
    """Score with bergson's EK-FAC: factors, eigenvalues and query gradients on disk, training chats scored in one pass.

    Its command line loads a model from a folder; these are the steps of its Hessian pipeline, with the model given.
    """
    config: Any = importlib.import_module("bergson.config.config")
    hessians: Any = importlib.import_module("bergson.hessians.hessian_approximations")
    scoring: Any = importlib.import_module("bergson.score.score")
    modules = {name.removeprefix("base_model.") for name in linear_maps(model)}
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)  # as its own loader does: gradients must reach every layer
    chats, asked, seen = map(bergson_data, (work.examples, work.queries, work.seen))
    query = bergson_collect(model, asked, modules, str(work.folder / "queries"), "mean")
    index = config.IndexConfig(run_path=str(work.folder / "curvature"))
    index.partial_run_path.mkdir(parents=True)
    torch.manual_seed(SEED)
    hessians.fit_factored_hessians(
        model,
        seen,
        index,
        config.HessianConfig(method="kfac", ev_correction=True),
        target_modules=modules,
        attention_cfgs={},
        batches=bergson_batches(seen),
        path=str(index.partial_run_path),
        do_eigendecomposition=True,
    )
    inversion = config.InversionConfig(inversion="absolute_damped_inverse", damping_factor=work.peer_damping)
    preprocess = config.PreprocessConfig(
        hessian_path=str(index.partial_run_path), ev_correction=True, inversion_cfg=inversion
    )
    place = work.folder / "scores"
    place.mkdir()
    device = next(model.parameters()).device
    wanted = config.ScoreConfig(query_path=str(query))
    scorer = scoring.create_scorer(place, chats, wanted, preprocess, device, torch.float32)
    writers: Any = importlib.import_module("bergson.score.score_writer")
    scorer.writer = writers.InMemorySequenceScoreWriter(len(chats), len(asked))
    bergson_collect(model, chats, modules, str(work.folder / "chats"), "sum", scorer)
    return work.from_peer(scorer.writer.scores.T)


def bergson_data(chats: Sequence[Example]) -> Any:
    """Return chats as the data set that bergson wants."""
    columns = {
        "input_ids": [list(chat.input_ids) for chat in chats],
        "labels": [list(chat.labels) for chat in chats],
        "length": [len(chat.input_ids) for chat in chats],
    }
    return importlib.import_module("datasets").Dataset.from_dict(columns)


def bergson_batches(data: Any) -> list[list[int]]:
    """Return numbers of chats of like length, at most as many a pass as the others take."""
    allocate: Any = importlib.import_module("bergson.data").allocate_batches
    lengths = list(data["length"])
    return allocate(lengths, max(lengths) * BATCH_SIZE, max_batch_size=BATCH_SIZE)  # type: ignore[no-any-return]


def bergson_collect(
    model: nn.Module, data: Any, modules: set[str], path: str, reduction: str, scorer: Any = None
) -> Path:
    """Write the gradient of each chat's summed or mean loss to disk, or score it at once; return the folder."""
    api: Any = importlib.import_module("bergson")
    index = api.IndexConfig(run_path=path, loss_reduction=reduction)
    index.partial_run_path.mkdir(parents=True)
    batches = bergson_batches(data)
    processor = api.GradientProcessor()
    api.collect_gradients(model, data, processor, index, batches=batches, target_modules=modules, scorer=scorer)
    return Path(index.partial_run_path)
