package guest

import (
	"net/http"

	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// Code is the status of an answer that is an error.
func Code(err error) int { return code(err) }

// Fail answers with an error.
func Fail(w http.ResponseWriter, err error) {
	write(w, code(err), vmwire.Problem{Message: err.Error()})
}

// Answer answers with v as JSON.
func Answer(w http.ResponseWriter, status int, v any) { write(w, status, v) }
