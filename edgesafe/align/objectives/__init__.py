"""What training works towards: one module per objective, and the table of them."""
