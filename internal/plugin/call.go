package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
)

const (
	mediaType = "application/vnd.docker.plugins.v1.2+json"
	maxAnswer = 4 << 20
	maxError  = 1 << 10 // of a plugin's own error text
)

// Call sends one request, METHOD being such as "VolumeDriver.Mount", and decodes
// the answer. Connections that cannot be made are tried again for the set's
// patience, since the plugin may just be starting; a request that may have arrived
// is never sent twice. ctx bounds it all.
func (p *Plugin) Call(ctx context.Context, method string, in, out any) error {
	fail := func(kind fault.Kind, err error) error {
		if errors.Is(err, context.DeadlineExceeded) {
			kind = fault.DeadlineExceeded
		}
		return fault.New(kind, "cannot ask plugin %s (%s): %w", p.Name, method, err)
	}
	body := []byte("{}\n")
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fail(fault.Internal, err)
		}
		body = b
	}
	begin := time.Now()
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 2*time.Second) {
		err := p.once(ctx, method, body, out)
		var op *net.OpError
		if err == nil {
			return nil
		}
		if !errors.As(err, &op) || op.Op != "dial" || ctx.Err() != nil || time.Since(begin)+wait > p.wait {
			if fault.Of(err) != fault.Internal {
				return err
			}
			if ctx.Err() != nil {
				err = ctx.Err()
			}
			return fail(fault.Unavailable, err)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return fail(fault.Unavailable, ctx.Err())
		}
	}
}

func (p *Plugin) once(ctx context.Context, method string, body []byte, out any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.base+"/"+method, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.GetBody = nil // sent once: the transport must not repeat it by itself
	req.Header.Set("Accept", mediaType)
	req.Header.Set("Content-Type", mediaType)
	resp, err := p.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return err
	}
	if len(b) > maxAnswer {
		return errors.New("its answer is too long")
	}
	var said struct{ Err string }
	jerr := json.Unmarshal(b, &said)
	switch {
	case jerr == nil && said.Err != "":
		return &Refused{Plugin: p.Name, Method: method, Text: clean(said.Err), Status: resp.StatusCode}
	case resp.StatusCode == http.StatusNotFound:
		return &Refused{Plugin: p.Name, Method: method, Text: "it does not know this method", Status: resp.StatusCode}
	case resp.StatusCode != http.StatusOK:
		return &Refused{Plugin: p.Name, Method: method, Text: clean(resp.Status + ": " + string(b)), Status: resp.StatusCode}
	case jerr != nil:
		return errors.New("its answer is not the JSON expected")
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return errors.New("its answer is not the JSON expected")
	}
	return nil
}

// Refused is a plugin's own word that it could not do something.
type Refused struct {
	Plugin, Method, Text string
	// Status is the HTTP status that it came with.
	Status int
}

func (r *Refused) Error() string { return r.Plugin + ": " + r.Method + ": " + r.Text }

// clean bounds a foreign text and takes out what terminals act upon.
func clean(s string) string {
	if len(s) > maxError {
		s = s[:maxError] + "…"
	}
	s = strings.ToValidUTF8(s, "\ufffd")
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return ' '
		}
		return r
	}, strings.TrimSpace(s))
}
