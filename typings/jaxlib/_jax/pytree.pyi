class PyTreeDef:
    num_leaves: int
    num_nodes: int
