package guest

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// ServeLog answers with lines of one of the machine's logs, as the request asks: source (init, kernel or
// engine), tail, follow.
func ServeLog(w http.ResponseWriter, r *http.Request, log func(ctx context.Context, w io.Writer, source string, tail int, follow bool) error) error {
	tail := 100
	if t := r.FormValue("tail"); t != "" {
		n, err := strconv.Atoi(t)
		if err != nil || n < 0 {
			return fault.New(fault.Invalid, "cannot show the last %q lines", t)
		}
		tail = n
	}
	source := r.FormValue("source")
	switch source {
	case "":
		source = "init"
	case "init", "kernel", "engine":
	default:
		return fault.New(fault.Invalid, "there is no log of %q: it is init, kernel or engine", source)
	}
	follow := r.FormValue("follow") == "1" || r.FormValue("follow") == "true"
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if err := log(r.Context(), flushing{w, http.NewResponseController(w)}, source, tail, follow); err != nil {
		fmt.Fprintf(w, "cannot read on: %v\n", err)
	}
	return nil
}

type flushing struct {
	io.Writer
	c *http.ResponseController
}

func (f flushing) Write(p []byte) (int, error) {
	n, err := f.Writer.Write(p)
	if err == nil {
		err = f.c.Flush()
	}
	return n, err
}
