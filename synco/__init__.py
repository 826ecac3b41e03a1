"""SynCo: MoCo-style contrastive pretraining with synthetic hard negatives."""
