"""Is this cluster fit to train on? What is measured on its nodes, and what is made of it.

Each module measures one thing on a node (`measure`), and says what is wrong with what all nodes
have measured (`check`).
"""
