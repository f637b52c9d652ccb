package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/api/system"
)

// OSStatus tells about the system of a CloudOS machine: its slots, and what became of
// the last upgrade.
func (c *Client) OSStatus(ctx context.Context) (system.Status, error) {
	var out system.Status
	err := c.read(ctx, api.Root+"/os/status", nil, &out)
	return out, err
}

// UpgradeOptions of OSUpgrade.
type UpgradeOptions struct {
	// URL is where the machine fetches the release; without it, the release is what is read.
	URL string
	// AllowUnsigned takes what no key that the machine trusts has signed; AllowDowngrade
	// takes an older system, or one whose age cannot be told.
	AllowUnsigned, AllowDowngrade bool
	// Reboot starts the machine again when the system is written.
	Reboot bool
	// Progress is told how far the machine is; it may be nil.
	Progress func(system.Progress)
}

// OSUpgrade writes a release into the slot that does not run. The machine verifies it before,
// and goes back by itself if it does not come up well.
func (c *Client) OSUpgrade(ctx context.Context, o UpgradeOptions, r io.Reader) (*system.Change, error) {
	req := &request{method: "POST", path: api.Root + "/os/upgrade", query: values("url", o.URL,
		"unsigned", flag(o.AllowUnsigned), "downgrade", flag(o.AllowDowngrade), "reboot", flag(o.Reboot))}
	if o.URL == "" {
		req.body, req.contentType = r, "application/x-tar"
	}
	resp, err := c.send(ctx, req)
	if err != nil {
		return nil, err
	}
	defer resp.body.Close()
	d := json.NewDecoder(resp.body)
	for {
		var p system.Progress
		if err := d.Decode(&p); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, ctxErr(ctx, fmt.Errorf("%w: it did not say what became of the upgrade (look with: cloudos status): %w", ErrConnectionLost, err))
		}
		switch {
		case p.Error != "":
			return nil, &Error{Status: p.Status, Message: p.Error}
		case p.Done != nil:
			return p.Done, nil
		case o.Progress != nil:
			o.Progress(p)
		}
	}
}

// OSRollback has the machine start the system in its other slot. force tries one that
// did not come up before.
func (c *Client) OSRollback(ctx context.Context, force, reboot bool) (*system.Change, error) {
	out := new(system.Change)
	err := c.do(ctx, &request{method: "POST", path: api.Root + "/os/rollback", query: values("force", flag(force), "reboot", flag(reboot))}, out)
	return out, err
}

// OSReboot starts the machine again.
func (c *Client) OSReboot(ctx context.Context) error {
	return c.do(ctx, &request{method: "POST", path: api.Root + "/os/reboot"}, nil)
}

// OSConfig tells the machine's configuration, without its secrets.
func (c *Client) OSConfig(ctx context.Context) (system.Config, error) {
	var out system.Config
	err := c.read(ctx, api.Root+"/os/config", nil, &out)
	return out, err
}

// SetOSConfig has the machine keep a document, which it checks, for its next start. A secret that is
// as it was shown stays as it is.
func (c *Client) SetOSConfig(ctx context.Context, document []byte, reboot bool) error {
	return c.do(ctx, &request{method: "PUT", path: api.Root + "/os/config", query: values("reboot", flag(reboot)), raw: document, contentType: "application/yaml"}, nil)
}

// OSRecoveryKey fetches the recovery key of the machine's encrypted data: once, in the start that made it.
func (c *Client) OSRecoveryKey(ctx context.Context) (string, error) {
	var out system.Recovery
	err := c.do(ctx, &request{method: "POST", path: api.Root + "/os/recovery"}, &out)
	return out.Key, err
}

// OSLogOptions of OSLog.
type OSLogOptions struct {
	Source string // init (default), kernel or engine
	Tail   int    // so many of the last lines
	Follow bool   // and those to come
}

// OSLog copies lines of one of the machine's logs to w.
func (c *Client) OSLog(ctx context.Context, o OSLogOptions, w io.Writer) error {
	resp, err := c.send(ctx, &request{method: "GET", path: api.Root + "/os/log", query: values("source", o.Source, "tail", strconv.Itoa(o.Tail), "follow", flag(o.Follow))})
	if err != nil {
		return err
	}
	defer resp.body.Close()
	_, err = io.Copy(w, resp.body)
	return ctxErr(ctx, err)
}
