"""Wire formats as data: what a client's body asks for, and the body that answers it. No HTTP."""
