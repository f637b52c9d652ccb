package guest

import (
	"net/http"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// Fail answers with an error.
func Fail(w http.ResponseWriter, err error) {
	write(w, fault.Of(err).Status(), vmwire.Problem{Message: err.Error()})
}

// Answer answers with v as JSON.
func Answer(w http.ResponseWriter, status int, v any) { write(w, status, v) }
