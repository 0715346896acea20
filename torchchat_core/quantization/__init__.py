"""Recipes: which layers become smaller, and how, in one form for every runtime."""
