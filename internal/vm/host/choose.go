package host

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vm"
)

// chosenFile keeps which driver the machine has that nobody configured one for: each keeps its data elsewhere, so it
// stays with the one that it began with.
const chosenFile = "driver.json"

type choice struct {
	Driver string `json:"driver"`
}

// chosen is the driver that was chosen earlier, if any.
func (h *Host) chosen() string {
	var c choice
	if ok, err := vm.ReadJSON(h.file(chosenFile), &c); err != nil || !ok {
		return ""
	}
	return c.Driver
}

// choose finds the driver to start the machine with: the configured one, the one that it began with, or the first of
// the platform's that can run the image here. It says why not the ones before.
func (h *Host) choose(ctx context.Context, name string, img vm.Image) (d vm.Driver, found vm.Host, why string, err error) {
	if name == "" && len(h.cfg.Drivers) > 1 {
		name = h.chosen()
		if name == "" {
			return h.first(ctx, img)
		}
		defer func() {
			if err != nil {
				err = fmt.Errorf("%w; the machine began with the driver %s, and what it keeps is there: 'servin vm config --driver NAME' begins anew with another", err, name)
			}
		}()
	}
	if d, err = h.driver(name); err != nil {
		return nil, found, "", err
	}
	found, err = d.Probe(ctx, img, h.cfg.Place.State)
	return d, found, "", err
}

// first is the first driver that can.
func (h *Host) first(ctx context.Context, img vm.Image) (vm.Driver, vm.Host, string, error) {
	var reasons []string
	var errs []error
	for _, d := range h.cfg.Drivers {
		found, err := d.Probe(ctx, img, h.cfg.Place.State)
		if err == nil {
			return d, found, strings.Join(reasons, "; "), nil
		}
		if ctx.Err() != nil {
			return nil, found, "", err
		}
		errs = append(errs, fmt.Errorf("%s: %w", d.Name(), err))
		reasons = append(reasons, d.Name()+": "+err.Error())
	}
	return nil, vm.Host{}, "", fault.New(fault.Unsupported, "no driver can run the machine on this computer: %w", errors.Join(errs...))
}

// keepers are the drivers that keep data themselves.
func (h *Host) keepers() []vm.Keeper {
	var out []vm.Keeper
	for _, d := range h.cfg.Drivers {
		if k, ok := d.(vm.Keeper); ok {
			out = append(out, k)
		}
	}
	return out
}

// keeps says whether a driver keeps something of the machine's itself.
func (h *Host) keeps(ctx context.Context) (bool, error) {
	for _, k := range h.keepers() {
		if kept, err := k.Keeps(ctx, h.spec()); err != nil || kept {
			return kept, err
		}
	}
	return false, nil
}
