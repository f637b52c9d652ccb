package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/volume"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/format"
)

// look finds an object by name, as the engine writes it.
type look func(ctx context.Context, c *client.Client, name string) (json.RawMessage, error)

func lookContainer(size *bool) look {
	return func(ctx context.Context, c *client.Client, name string) (json.RawMessage, error) {
		return c.ContainerInspectRaw(ctx, name, *size)
	}
}

func lookImage(platform *string) look {
	return func(ctx context.Context, c *client.Client, name string) (json.RawMessage, error) {
		return c.ImageInspectRaw(ctx, name, *platform)
	}
}

func lookVolume(ctx context.Context, c *client.Client, name string) (json.RawMessage, error) {
	_, raw, err := c.VolumeInspect(ctx, name)
	return raw, err
}

func lookNetwork(ctx context.Context, c *client.Client, name string) (json.RawMessage, error) {
	_, raw, err := c.NetworkInspect(ctx, name, false)
	return raw, err
}

// typed decodes an object for a template, in which Go's names count (.ID) beside
// those of the JSON (.Id).
func typed(raw json.RawMessage) (any, error) {
	var shape struct {
		Mountpoint, IPAM, RootFS, HostConfig json.RawMessage
	}
	if err := json.Unmarshal(raw, &shape); err != nil {
		return nil, err
	}
	var v any
	switch {
	case shape.HostConfig != nil:
		v = new(container.InspectResponse)
	case shape.RootFS != nil:
		v = new(image.InspectResponse)
	case shape.IPAM != nil:
		v = new(network.Inspect)
	case shape.Mountpoint != nil:
		v = new(volume.Volume)
	default:
		v = new(map[string]any)
	}
	return v, json.Unmarshal(raw, v)
}

// inspectFlags are the options of every inspect.
type inspectFlags struct {
	format string
	json   bool
}

func (o *inspectFlags) declare(f *command.FlagSet) {
	f.String(&o.format, "format", "f", "Print by a Go template, 'json' as one line")
	f.Bool(&o.json, "json", "", "Print JSON, one object a line")
}

// inspect prints objects as an indented JSON list or by a template; what was
// found is printed even when other names were not.
func (a *App) inspect(ctx context.Context, names []string, o *inspectFlags, fn look) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	tmpl := o.format
	if o.json {
		tmpl = "json"
	}
	var errs []error
	var all []json.RawMessage
	for _, n := range names {
		raw, err := fn(ctx, c, n)
		if err != nil {
			errs = append(errs, err)
			if _, ok := err.(*client.ConnectError); ok {
				return err
			}
			continue
		}
		if tmpl == "" {
			all = append(all, raw)
			continue
		}
		var v any
		if tmpl != "json" {
			if v, err = typed(raw); err != nil {
				return err
			}
		}
		if err := format.Object(a.out, v, raw, tmpl); err != nil {
			return err
		}
	}
	if tmpl == "" {
		list := append([]byte{'['}, bytes.Join(asBytes(all), []byte{','})...)
		var out bytes.Buffer
		if err := json.Indent(&out, append(list, ']'), "", "    "); err != nil {
			return err
		}
		out.WriteByte('\n')
		if _, err := out.WriteTo(a.out); err != nil {
			return err
		}
	}
	return joined(errs)
}

func asBytes(l []json.RawMessage) [][]byte {
	out := make([][]byte, len(l))
	for i, b := range l {
		out[i] = bytes.TrimSpace(b)
	}
	return out
}

func (a *App) inspectOf(kind, short string, complete string, more func(*command.FlagSet), fn look) *command.Command {
	var o inspectFlags
	return &command.Command{Name: "inspect", Args: kind + " [" + kind + "...]", Short: short, Min: 1, Max: -1, Complete: []string{complete},
		Flags: func(f *command.FlagSet) {
			o.declare(f)
			if more != nil {
				more(f)
			}
		},
		Run: func(ctx context.Context, args []string) error { return a.inspect(ctx, args, &o, fn) }}
}

func (a *App) cmdInspectContainer() *command.Command {
	size := false
	return a.inspectOf("CONTAINER", "Show all about containers", "container", func(f *command.FlagSet) {
		f.Bool(&size, "size", "s", "Measure the containers' files")
	}, lookContainer(&size))
}

func (a *App) cmdInspectImage() *command.Command {
	platform := ""
	return a.inspectOf("IMAGE", "Show all about images", "image", func(f *command.FlagSet) {
		f.String(&platform, "platform", "", "The image for this platform, os/arch[/variant]").Of("platform")
	}, lookImage(&platform))
}

func (a *App) cmdInspectVolume() *command.Command {
	return a.inspectOf("VOLUME", "Show all about volumes", "volume", nil, lookVolume)
}

func (a *App) cmdInspectNetwork() *command.Command {
	return a.inspectOf("NETWORK", "Show all about networks", "network", func(f *command.FlagSet) {
		verbose := false
		f.Bool(&verbose, "verbose", "v", "Show more").Hide()
	}, lookNetwork)
}

func (a *App) cmdInspectAny() *command.Command {
	typ, size := "", false
	var o inspectFlags
	cmd := &command.Command{Name: "inspect", Args: "NAME [NAME...]", Short: "Show all about containers, images, networks or volumes",
		Min: 1, Max: -1, Complete: []string{"any"}}
	cmd.Flags = func(f *command.FlagSet) {
		o.declare(f)
		f.String(&typ, "type", "", "Look among one kind only: container, image, network, volume").Of("type")
		f.Bool(&size, "size", "s", "Measure a container's files")
	}
	cmd.Run = func(ctx context.Context, args []string) error {
		none := ""
		kinds := []struct {
			name string
			fn   look
		}{{"container", lookContainer(&size)}, {"image", lookImage(&none)}, {"network", lookNetwork}, {"volume", lookVolume}}
		known := false
		for _, k := range kinds {
			known = known || k.name == typ
		}
		if typ != "" && !known {
			return usagef("cannot inspect type %q: it is none of container, image, network, volume", typ)
		}
		return a.inspect(ctx, args, &o, func(ctx context.Context, c *client.Client, name string) (json.RawMessage, error) {
			for _, k := range kinds {
				if typ != "" && k.name != typ {
					continue
				}
				x, err := k.fn(ctx, c, name)
				if err == nil || !client.IsNotFound(err) || typ != "" {
					return x, err
				}
			}
			return nil, &client.Error{Status: 404, Message: fmt.Sprintf("no container, image, network or volume is called %s", name)}
		})
	}
	return cmd
}
