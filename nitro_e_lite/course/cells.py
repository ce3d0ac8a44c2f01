"""Which cells of a notebook others need, so that those run alone.

A cell is needed when it defines a name that a needed one uses.
"""

import ast


def stored(tree: ast.AST) -> set[str]:
    """Names that a piece of code defines, those inside its functions and classes left out."""
    found, todo = set(), [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            continue
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            found.add(node.value.id)  # Model.forward = forward
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.comprehension):  # its variable ends with it
            todo.append(node.iter)
            continue
        todo += ast.iter_child_nodes(node)
    return found


def loaded(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Names that a cell takes from cells before it, when it runs and when its functions are called."""
    now, late = set(), set()

    def uses(node: ast.AST) -> set[str]:
        inner = {name for n in ast.walk(node) if isinstance(n, ast.comprehension) for name in stored(n.target)}
        for function in (n for n in ast.walk(node) if isinstance(n, (ast.FunctionDef, ast.Lambda))):
            body = function.body if isinstance(function.body, list) else []
            inner |= {n.arg for n in ast.walk(function.args) if isinstance(n, ast.arg)}
            inner |= {name for line in body for name in stored(line)}
        return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} - inner

    def run(statements: list[ast.stmt], own: set[str]) -> None:
        """In order; `own` are names that the cell has defined by then, those of a loop before its body."""
        for statement in statements:
            blocks = [getattr(statement, name, []) for name in ("body", "handlers", "orelse", "finalbody")]
            if isinstance(statement, ast.FunctionDef):
                late.update(uses(statement))
            elif isinstance(statement, ast.ClassDef) or not any(blocks):
                now.update(uses(statement) - own)
                if isinstance(statement, ast.AugAssign):
                    now.update(stored(statement.target) - own)
            else:
                inside = {part for block in blocks for part in block}
                head = [part for part in ast.iter_child_nodes(statement) if part not in inside]
                now.update({name for part in head for name in uses(part)} - own)
                own.update(name for part in head for name in stored(part))
                for block in blocks:
                    run(block, own)
            own.update(stored(statement))

    run(tree.body, set())
    return now, late


def needed(cells: list[str], last: int) -> list[int]:
    """Numbers of the cells that cell `last` needs, itself included, in order."""
    trees = [ast.parse(cell) for cell in cells]
    late, kept = set(), {last}  # late: names that functions look up when they are called
    while True:
        wanted, before = set(), set(kept)
        for number in range(last, -1, -1):
            if number in kept or stored(trees[number]) & (wanted | late):
                kept.add(number)
                now, later = loaded(trees[number])
                wanted, late = wanted - stored(trees[number]) | now, late | later
        if kept == before:
            return sorted(kept)
