package native

import (
	"context"

	contract "github.com/cloudos-io/cloudos/internal/runtime"
)

// Gauge reads the main counters of Stats alone.
func (t *task) Gauge(context.Context) (*contract.Stats, error) {
	if err := t.running("read statistics"); err != nil {
		return nil, err
	}
	return t.group.Gauge()
}

// Details reads what Stats leaves out.
func (t *task) Details(context.Context) (*contract.Details, error) {
	if err := t.running("read statistics"); err != nil {
		return nil, err
	}
	return t.group.Details()
}
