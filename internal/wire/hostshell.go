package wire

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"time"

	"github.com/cloudos-io/cloudos/api/debugshell"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// hostShell asks the first process of a CloudOS machine about its debug shell. On any other
// computer nobody answers at its socket, and it says so.
type hostShell struct{ socket string }

func (h hostShell) ask(ctx context.Context, method, path string, body, answer any) error {
	if _, err := os.Stat(h.socket); errors.Is(err, os.ErrNotExist) {
		return fault.New(fault.Unsupported, "this computer does not run CloudOS: it has no debug shell")
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var in io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		in = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://machine"+path, in)
	if err != nil {
		return err
	}
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", h.socket)
	}}}
	res, err := c.Do(req)
	if err != nil {
		return fault.New(fault.Unavailable, "cannot ask the machine about its debug shell: %w", err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		return fault.New(fault.Unavailable, "cannot ask the machine about its debug shell: %w", err)
	}
	if res.StatusCode >= 300 {
		var p struct {
			Message string `json:"message"`
		}
		_ = json.Unmarshal(b, &p)
		if p.Message == "" {
			return fault.New(fault.Internal, "the machine answers %s about its debug shell", res.Status)
		}
		return fault.New(fault.FromStatus(res.StatusCode), "%s", p.Message)
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(b, answer)
}

func (h hostShell) Status(ctx context.Context) (s debugshell.Status, err error) {
	return s, h.ask(ctx, http.MethodGet, "/", nil, &s)
}

func (h hostShell) Enable(ctx context.Context, req debugshell.Request) (s debugshell.Status, err error) {
	return s, h.ask(ctx, http.MethodPost, "/", req, &s)
}

func (h hostShell) Disable(ctx context.Context, by string) (s debugshell.Status, err error) {
	return s, h.ask(ctx, http.MethodDelete, "/?by="+url.QueryEscape(by), nil, &s)
}

func (h hostShell) Begin(ctx context.Context, s debugshell.Session) error {
	return h.ask(ctx, http.MethodPost, "/sessions", s, nil)
}

func (h hostShell) End(ctx context.Context, id string) error {
	return h.ask(ctx, http.MethodDelete, "/sessions/"+url.PathEscape(id), nil, nil)
}
