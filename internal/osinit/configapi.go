package osinit

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"os"

	"github.com/cloudos-io/cloudos/api/system"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/osinit/config"
	"github.com/cloudos-io/cloudos/internal/osinit/guest"
)

// configAPI is GET /servin/os/config.
func (c *changes) configAPI(http.ResponseWriter, *http.Request) (any, error) {
	m := c.m
	m.mu.Lock()
	out := system.Config{Source: m.configSource}
	used := m.document
	m.mu.Unlock()
	out.Document = string(m.Config())
	kept, err := m.keptConfig()
	if err != nil {
		return nil, err
	}
	if kept != nil && !bytes.Equal(kept, used) {
		out.Next = string(config.Redacted(kept))
	}
	return out, nil
}

// setConfigAPI is PUT /servin/os/config: the document is the body.
func (c *changes) setConfigAPI(w http.ResponseWriter, r *http.Request) (any, error) {
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, config.MaxSize))
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot read the document: %w", err)
	}
	end, err := c.begin("keep the configuration")
	if err != nil {
		return nil, err
	}
	err = c.m.SetConfig(b)
	end()
	if err != nil {
		return nil, err
	}
	c.m.log.Printf("another configuration is kept for the next start")
	if flag(r, "reboot") {
		c.reboot()
	}
	w.WriteHeader(http.StatusNoContent)
	return nil, nil
}

// recoveryAPI is POST /servin/os/recovery: it gives the recovery key out, once.
func (c *changes) recoveryAPI(http.ResponseWriter, *http.Request) (any, error) {
	r, err := c.m.RecoveryKey()
	if err != nil {
		return nil, err
	}
	c.m.log.Printf("the recovery key of the data was given out over the network's API")
	return system.Recovery{Key: r.Key}, nil
}

// logAPI is GET /servin/os/log.
func (c *changes) logAPI(w http.ResponseWriter, r *http.Request) (any, error) {
	return nil, guest.ServeLog(w, r, c.m.Log)
}

// keptConfig is the document on the data disk; nil is none.
func (m *machine) keptConfig() ([]byte, error) {
	m.mu.Lock()
	kind := m.dataKind
	m.mu.Unlock()
	if kind != "disk" {
		return nil, nil
	}
	b, err := os.ReadFile(configFile)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return b, err
}
