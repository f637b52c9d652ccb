package adopt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/volume"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/tree"
)

// Adopter carries steps out. Its methods are not safe for concurrent use.
type Adopter struct {
	From, To *client.Client
	// Progress is told the bytes that have been moved of the step under way.
	Progress func(moved int64)
	// Warn is told what could not be brought over as it was.
	Warn func(string)

	// Archives and Layers are for engines of ours on both sides: volumes come as
	// archives that are checked, containers with what they wrote.
	Archives, Layers bool

	// ids are images' ids here by those there, of images without a name.
	ids map[string]string
}

// Do carries one step out: whole, or not at all.
func (a *Adopter) Do(ctx context.Context, s *Step) error {
	if s.Skip != "" {
		return nil
	}
	switch s.Kind {
	case Images:
		return a.image(ctx, s)
	case Volumes:
		return a.volume(ctx, s)
	case Networks:
		return a.network(ctx, s)
	case Containers:
		return a.container(ctx, s)
	case Secrets, Configs:
		return a.secret(ctx, s)
	}
	return fmt.Errorf("cannot adopt a %s", s.Kind)
}

// counter tells how much went through.
type counter struct {
	r    io.Reader
	n    int64
	tell func(int64)
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if c.tell != nil {
		c.tell(c.n)
	}
	return n, err
}

func (a *Adopter) image(ctx context.Context, s *Step) error {
	r, err := a.From.ImageSave(ctx, []string{s.Name}, nil)
	if err != nil {
		return err
	}
	defer r.Close()
	loaded := ""
	err = a.To.ImageLoad(ctx, &counter{r: r, tell: a.Progress}, true, nil, func(p client.Progress) error {
		if id, ok := strings.CutPrefix(strings.TrimSpace(p.Stream), "Loaded image ID: "); ok {
			loaded = id
		}
		return nil
	})
	if err == nil && loaded != "" {
		if a.ids == nil {
			a.ids = map[string]string{}
		}
		a.ids[s.image.ID] = loaded
	}
	return err
}

func (a *Adopter) volume(ctx context.Context, s *Step) error {
	v := s.volume
	if mounted(v) {
		_, err := a.To.VolumeCreate(ctx, volume.CreateRequest{Name: v.Name, DriverOpts: v.Options, Labels: v.Labels})
		return err
	}
	if a.Archives {
		return a.archive(ctx, v.Name)
	}
	if fi, err := os.Lstat(v.Mountpoint); err != nil {
		return fmt.Errorf("cannot read the volume's directory: %w", err)
	} else if !fi.IsDir() {
		return fmt.Errorf("cannot read the volume's directory: %s is none", v.Mountpoint)
	}
	pr, pw := io.Pipe()
	packed := make(chan struct{})
	go func() {
		defer close(packed)
		pw.CloseWithError(tree.PackAll(pw, v.Mountpoint, ".", a.Warn))
	}()
	err := a.To.VolumeImport(ctx, v.Name, client.RestoreOptions{Devices: true, Labels: v.Labels}, &counter{r: pr, tell: a.Progress})
	pr.CloseWithError(errors.Join(err, io.ErrClosedPipe)) // a refused import ends the reading too
	<-packed
	return err
}

func (a *Adopter) network(ctx context.Context, s *Step) error {
	_, err := a.To.NetworkCreate(ctx, s.network)
	if err == nil || s.network.IPAM == nil || !refused(err) {
		return err
	}
	// The other engine's bridge still has these addresses on this host.
	req := s.network
	req.IPAM = nil
	resp, again := a.To.NetworkCreate(ctx, req)
	if again != nil {
		return err
	}
	var had []string
	for _, c := range s.network.IPAM.Config {
		had = append(had, c.Subnet.String())
	}
	if a.Warn != nil {
		a.Warn(fmt.Sprintf("network %s (%.12s) has other addresses here: %s is in use on this host", s.Name, resp.ID, strings.Join(had, ", ")))
	}
	return nil
}

func (a *Adopter) container(ctx context.Context, s *Step) error {
	o := s.create
	cfg := *o.Config
	if id, ok := a.ids[s.imageID]; ok && cfg.Image == s.imageID {
		cfg.Image = id
	}
	if a.Layers && s.written {
		id, err := a.layer(ctx, s)
		if err != nil {
			return fmt.Errorf("cannot bring what it wrote: %w", err)
		}
		cfg.Image = id
	}
	o.Config = &cfg
	resp, err := a.To.ContainerCreate(ctx, o)
	if err != nil && o.Networking != nil && static(o.Networking) {
		// A fixed address of a network that has other ones here.
		for _, ep := range o.Networking.EndpointsConfig {
			ep.IPAMConfig = nil
		}
		first := err
		if resp, err = a.To.ContainerCreate(ctx, o); err != nil {
			return first
		}
		a.Warn("container " + s.Name + " has no fixed address here: " + first.Error())
	}
	if err != nil {
		return err
	}
	for _, j := range s.others {
		if err = a.To.NetworkConnect(ctx, j.network, network.ConnectRequest{Container: resp.ID, EndpointConfig: j.endpoint}); err == nil {
			continue
		}
		// Half of it would look adopted to the next run.
		undo := a.To.ContainerRemove(context.WithoutCancel(ctx), resp.ID, client.RemoveOptions{Force: true})
		return errors.Join(fmt.Errorf("cannot connect it to %s: %w", j.network, err), undo)
	}
	for _, w := range resp.Warnings {
		a.Warn("container " + s.Name + ": " + w)
	}
	return nil
}

// refused: the engine was reached and did not like the request.
func refused(err error) bool {
	st := client.Status(err)
	return st == 400 || st == 403 || st == 409
}

func static(n *network.NetworkingConfig) bool {
	for _, ep := range n.EndpointsConfig {
		if ep.IPAMConfig != nil {
			return true
		}
	}
	return false
}
