//go:build tools

// Package tools pins the OCI validation suite and what it was written against; `make validate` builds it.
package tools

import (
	_ "github.com/opencontainers/runtime-tools/cmd/runtimetest"
	_ "github.com/opencontainers/runtime-tools/validation/util"
)
