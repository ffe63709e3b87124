"""What a program is: mesh, types, graph, capture, blocks, plan, errors."""
