"""Text from a model on any mesh: many sequences at a time, the same tokens in every layout.

Rank 0 is the driver: its `Scheduler` decides what is computed next and tells the other ranks by a `Plan`; every rank's
`Worker` runs plans on its stages, and the last stage answers with the tokens. Workers know nothing but their caches.
"""
