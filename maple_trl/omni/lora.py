"""Which parts of an omni model are trained: LoRA targets and frozen parts, by scope."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from torch import nn

from maple_trl.modalities import SCOPES
from maple_trl.omni.families import OmniFamily, unwrap


if TYPE_CHECKING:
    from peft import LoraConfig


def linear_modules(model: nn.Module, family: OmniFamily) -> dict[str, list[str]]:
    """Name the linear layers of each scope that a pass reads; the LM head belongs to none."""
    found: dict[str, list[str]] = {scope: [] for scope in SCOPES if scope in family.scopes}
    for name, module in unwrap(model).named_modules():
        scope = family.scope_of(name)
        if isinstance(module, nn.Linear) and scope is not None and not family.is_unread(f"{name}.weight"):
            found[scope].append(name)
    return found


def build_lora_config(
    model: nn.Module,
    family: OmniFamily,
    *,
    vision: bool = True,
    audio: bool = True,
    projectors: bool = True,
    llm: bool = True,
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    console: Console | None = None,
) -> LoraConfig:
    """
    Build a LoRA configuration over the linear layers of the chosen scopes (AVATAR trains all four).

    Prints how many layers of each scope matched.

    Args:
        vision, audio, projectors, llm (`bool`): the scopes to adapt. A scope that the family lacks is passed over.
        r, alpha, dropout: as in `peft.LoraConfig`.

    Raises:
        ValueError: when no scope is chosen, or a chosen scope of the family has no linear layer.
    """
    from peft import LoraConfig

    chosen = dict(zip(SCOPES, (vision, audio, projectors, llm), strict=True))
    layers = linear_modules(model, family)
    _print_table(chosen, layers, console or Console())
    empty = [scope for scope in layers if chosen[scope] and not layers[scope]]
    if empty:
        raise ValueError(
            f"LoRA on {', '.join(empty)} matches no linear layer of {type(unwrap(model)).__name__}; the pattern(s): "
            + ", ".join(repr(family.scopes[scope]) for scope in empty)
        )
    targets = [name for scope, names in layers.items() if chosen[scope] for name in names]
    if not targets:
        raise ValueError(f"LoRA has nothing to adapt: switch on one of {', '.join(layers)}")
    # Whole names, not a pattern: of a mixture of experts PEFT takes a pattern apart and matches the pieces.
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")


def _print_table(chosen: dict[str, bool], layers: dict[str, list[str]], console: Console) -> None:
    table = Table(title="LoRA targets")
    for column in ("scope", "adapted", "linear layers", "e.g."):
        table.add_column(column)
    for scope, names in layers.items():
        table.add_row(scope, "yes" if chosen[scope] else "no", str(len(names)), names[0] if names else "-")
    console.print(table)


def freeze(model: nn.Module, family: OmniFamily, *scopes: str) -> dict[str, int]:
    """
    Stop training the parameters of the named scopes.

    Returns:
        `dict[str, int]`: frozen parameters per scope.

    Raises:
        ValueError: for an unknown scope, or one that holds no parameter.
    """
    frozen = dict.fromkeys(scopes, 0)
    unknown = sorted(set(scopes) - set(family.scopes))
    if unknown:
        raise ValueError(f"{type(family).__name__} has no {', '.join(unknown)}; it has {', '.join(family.scopes)}")
    for name, parameter in unwrap(model).named_parameters():
        scope = family.scope_of(name)
        if scope in frozen:
            parameter.requires_grad_(False)
            frozen[scope] += parameter.numel()
    nothing = [scope for scope, count in frozen.items() if not count]
    if nothing:
        raise ValueError(f"No parameter of {type(unwrap(model)).__name__} belongs to {', '.join(nothing)}")
    return frozen
