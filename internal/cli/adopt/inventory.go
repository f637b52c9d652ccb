// Package adopt brings what another engine on the host has — images, volumes,
// networks and definitions of containers — to ours. The other side is only read.
//
// Three steps: Read takes an Inventory of each side over the Docker Engine API
// (Podman serves it too), Decide compares the two and lists Steps without doing
// anything, and Adopter.Do carries one out. Each step is whole or not at all and
// finds what an earlier run has done, so an interrupted adoption is begun again.
//
// The command line imports it.
package adopt

import (
	"context"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/volume"

	"github.com/cloudos-io/cloudos/client"
)

// Inventory is what an engine has.
type Inventory struct {
	Images     []Image
	Volumes    []volume.Volume
	Networks   []network.Network
	Containers []container.InspectResponse
}

// Image is an image with all its names.
type Image struct {
	ID   string
	Tags []string
	// Size in bytes, as its engine counts.
	Size int64
	// Print is equal for equal images of different engines, whose ids may be
	// digests of different things: of their layers and when they were made.
	Print string
}

// Read takes an engine's inventory.
func Read(ctx context.Context, c *client.Client) (Inventory, error) {
	var inv Inventory
	images, err := c.ImageList(ctx, client.ImageListOptions{})
	if err != nil {
		return inv, err
	}
	for _, s := range images {
		img := Image{ID: s.ID, Size: s.Size}
		for _, t := range s.RepoTags {
			if t != "<none>:<none>" {
				img.Tags = append(img.Tags, t)
			}
		}
		full, _, err := c.ImageInspect(ctx, s.ID, "")
		if client.IsNotFound(err) {
			continue // removed meanwhile
		}
		if err != nil {
			return inv, err
		}
		img.Print = fingerprint(&full)
		inv.Images = append(inv.Images, img)
	}
	vols, err := c.VolumeList(ctx, nil)
	if err != nil {
		return inv, err
	}
	inv.Volumes = vols.Volumes
	nets, err := c.NetworkList(ctx, nil)
	if err != nil {
		return inv, err
	}
	for _, n := range nets {
		inv.Networks = append(inv.Networks, n.Network)
	}
	list, err := c.ContainerList(ctx, client.ContainerListOptions{All: true})
	if err != nil {
		return inv, err
	}
	for _, s := range list {
		full, _, err := c.ContainerInspect(ctx, s.ID, true)
		if client.IsNotFound(err) {
			continue
		}
		if err != nil {
			return inv, err
		}
		inv.Containers = append(inv.Containers, full)
	}
	return inv, nil
}

func fingerprint(i *image.InspectResponse) string {
	if len(i.RootFS.Layers) == 0 {
		return i.ID
	}
	return strings.Join(append(slices.Clone(i.RootFS.Layers), i.Created, i.Architecture), " ")
}
