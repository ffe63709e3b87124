"""Temporary."""
from dataclasses import dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    name: str
    statement: tuple[str, int]
    outer: tuple[str, int]
    module_path: str
    section: str
    is_name_of_statement: bool
    aliases: tuple[str, ...]
def origins(graph): 
    return {n: Origin(name=str(n.meta.get("name", n.name)), statement=("",0), outer=("",0), module_path="", section="", is_name_of_statement=False, aliases=()) for n in graph.nodes if n.op=="call_function"}
