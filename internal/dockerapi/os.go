package dockerapi

import (
	"net/http"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// osAPI passes what is about the system itself on to the machine's first process.
type osAPI struct {
	next http.Handler
	sys  System
}

func (a osAPI) pass(w *response, r *request) error {
	// Another system, unsigned if that is asked for, is root as much as a privileged container is.
	return a.serve(w, r, r.Method != http.MethodGet)
}

// log shows what of a host its root alone may see: the kernel's messages are among it.
func (a osAPI) log(w *response, r *request) error { return a.serve(w, r, true) }

func (a osAPI) serve(w *response, r *request, asHost bool) error {
	if a.next == nil {
		return fault.New(fault.NotFound, "this engine does not run on a CloudOS machine: it has no system to look at or to upgrade")
	}
	if asHost {
		if err := a.sys.MayActAsHost(r.Context()); err != nil {
			return err
		}
	}
	a.next.ServeHTTP(w, r.Request)
	return nil
}
