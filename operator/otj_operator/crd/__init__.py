"""The CustomResourceDefinition, generated from the models of `otj_runtime.api`, and the manifests that install the operator."""
