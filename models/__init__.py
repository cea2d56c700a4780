"""Holds the weights and the cards of what ships; `training/shipped` makes them."""
