"""SynCo: MoCo-style contrastive pretraining with synthetic hard negatives."""

__version__ = "0.1.0"
