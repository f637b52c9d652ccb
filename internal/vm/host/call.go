package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// maxAnswer bounds what the guest may answer.
const maxAnswer = 32 << 20

var errAsleep = fault.New(fault.Unavailable, "the machine is not up")

// call asks the guest's control API.
func (l *live) call(ctx context.Context, method, path string, in, out any) error {
	_, _, ctl := l.conversation()
	return ask(ctx, ctl, method, path, in, out)
}

// engine asks the engine in the guest.
func (l *live) engine(ctx context.Context, method, path string, in, out any) error {
	_, api, _ := l.conversation()
	return ask(ctx, api, method, path, in, out)
}

func ask(ctx context.Context, c *http.Client, method, path string, in, out any) error {
	resp, err := open(ctx, c, method, path, in)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body := io.LimitReader(resp.Body, maxAnswer)
	if out == nil {
		_, err := io.Copy(io.Discard, body)
		return err
	}
	if err := json.NewDecoder(body).Decode(out); err != nil {
		return fmt.Errorf("cannot read the machine's answer to %s %s: %w", method, path, err)
	}
	return nil
}

// open asks and gives an answer that is no error.
func open(ctx context.Context, c *http.Client, method, path string, in any) (*http.Response, error) {
	if c == nil {
		return nil, errAsleep
	}
	var body io.Reader
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://machine"+path, body)
	if err != nil {
		return nil, err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.Do(req)
	if err != nil {
		return nil, fmt.Errorf("cannot ask the machine: %w", err)
	}
	if resp.StatusCode >= 400 {
		defer resp.Body.Close()
		raw, _ := io.ReadAll(io.LimitReader(resp.Body, 16<<10))
		var p vmwire.Problem
		if json.Unmarshal(raw, &p) != nil || p.Message == "" {
			p.Message = resp.Status
		}
		return nil, fault.As(fault.FromStatus(resp.StatusCode), errors.New(bounded(p.Message)))
	}
	return resp, nil
}

// bounded makes a text of the guest fit to be shown.
func bounded(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return ' '
		}
		return r
	}, s)
	if len(s) > 500 {
		s = s[:500] + "…"
	}
	return s
}

func pauses(m vm.Machine) bool {
	_, ok := m.(vm.Pauser)
	return ok
}
