package guest

import (
	"net/http"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

func (c *Control) recovery(http.ResponseWriter, *http.Request) (any, error) {
	return c.machine.RecoveryKey()
}

func (c *Control) unlock(w http.ResponseWriter, r *http.Request) (any, error) {
	var b vmwire.Unlock
	if err := read(r, &b); err != nil {
		return nil, err
	}
	if b.Key == "" || len(b.Key) > 512 {
		return nil, fault.New(fault.Invalid, "key must have 1 to 512 bytes")
	}
	if err := c.machine.Unlock(r.Context(), b.Key); err != nil {
		return nil, err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil, nil
}
