"""Model families: what distillation has to know of one, an adapter each, found by the class of the
transformer."""
